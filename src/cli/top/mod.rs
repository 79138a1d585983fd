//! A live view of a daemon.

mod frame;
mod rates;
mod terminal;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use self::frame::{Size, frame};
use self::rates::Rates;
use self::terminal::{Key, Keys, Screen};
use super::connect::{Place, block_on};
use super::print_json;
use crate::daemon::api::observe::Activity;
use crate::daemon::client::Client;

/// Watch a daemon: misses, latency, sources, cache and images
///
/// Refreshes every second. Numbers with /s are of the last second. `q` or Ctrl-C ends it.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct TopArgs {
    /// Watch for one second, print one frame and exit
    #[arg(long)]
    once: bool,

    /// Print one JSON object for each second instead
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    place: Place,
}

const EXAMPLE: &str = "\
Example:
  rafsd top
  rafsd top --once --json";

/// How often the view is refreshed.
const EVERY: Duration = Duration::from_secs(1);

/// Exit status: 0 when the user has seen enough.
pub(super) fn run(args: TopArgs) -> anyhow::Result<ExitCode> {
    let live = !args.once && !args.json;
    ensure!(!live || io::stdout().is_terminal(), "standard output is no terminal; use --once or --json");
    block_on(async {
        let client = args.place.client()?;
        let first = client.activity().await.map_err(|e| args.place.explain(e))?;
        if live { watch(&client, first).await } else { print(&client, first, &args).await }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Frames one below the other, or objects.
async fn print(client: &Client, mut before: Activity, args: &TopArgs) -> anyhow::Result<()> {
    loop {
        tokio::time::sleep(EVERY).await;
        let now = client.activity().await?;
        let rates = Rates::between(&before, &now);
        if args.json {
            print_json(&rates.with(&now))?;
        } else {
            let lines = frame(&now, &rates, terminal::size().unwrap_or(Size::DEFAULT));
            writeln!(io::stdout(), "{}", lines.join("\n"))?;
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

/// One frame in the place of the other, until somebody ends it.
async fn watch(client: &Client, mut before: Activity) -> anyhow::Result<()> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut resized = signal(SignalKind::window_change())?;
    // From here on every way out of this function gives the terminal back as it was.
    let screen = Screen::take()?;
    let mut keys = Keys::new()?;
    let mut now = before.clone();
    let mut ticks = interval_at(Instant::now() + EVERY, EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let rates = Rates::between(&before, &now);
        screen.show(&frame(&now, &rates, terminal::size().unwrap_or(Size::DEFAULT)))?;
        tokio::select! {
            _ = ticks.tick() => before = std::mem::replace(&mut now, client.activity().await?),
            key = keys.next() => if key? == Key::Quit { return Ok(()) },
            _ = resized.recv() => {}
            _ = term.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}
