//! The program: see `rafsd --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    rafsd::cli::run()
}
