//! Debian's squid, a forward proxy.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Program, find, free_port, private_dir};

/// From where it asks, so that its requests are told apart from ours.
pub const PEER: &str = "127.0.0.2";

/// A running squid, which keeps nothing.
pub struct Squid {
    program: Program,
}

/// One request as the access log tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// `TCP_TUNNEL/200`, `TCP_DENIED/407` and the like.
    pub outcome: String,
    pub method: String,
    pub target: String,
}

impl Squid {
    /// One for everybody, or for who knows `login`, a name and a password.
    pub fn start(login: Option<(&str, &str)>) -> Self {
        let (dir, port) = (private_dir(), free_port());
        let here = dir.path().display().to_string();
        let access = match login {
            None => "http_access allow localhost".to_owned(),
            Some((user, password)) => {
                let file = dir.path().join("passwords");
                let made = Command::new("htpasswd").args(["-nbm", user, password]).output().unwrap();
                assert!(made.status.success(), "htpasswd: {made:?}");
                fs::write(&file, made.stdout).unwrap();
                format!(
                    "auth_param basic program {HELPER} {}\nacl known proxy_auth REQUIRED\nhttp_access allow known",
                    file.display()
                )
            }
        };
        let config = format!(
            "http_port 127.0.0.1:{port}\n{access}\nhttp_access deny all\ncache deny all\npid_filename none\n\
             netdb_filename none\npinger_enable off\nvisible_hostname proxy.test\nmax_filedescriptors 1024\n\
             coredump_dir {here}\ncache_log {here}/cache.log\naccess_log stdio:{here}/access\nlogfile_rotate 0\n\
             mime_table /usr/share/squid/mime.conf\nshutdown_lifetime 1 seconds\ncache_mem 4 MB\n\
             tcp_outgoing_address {PEER}\nconnect_timeout 5 seconds\n"
        );
        fs::write(dir.path().join("squid.conf"), config).unwrap();
        // Its shared memory has the name, and another squid on this host may be another user's.
        let args = ["-N", "-n", &service(port), "-f", &format!("{here}/squid.conf")].map(str::to_owned);
        Self { program: Program::start("squid", args.into(), dir, port) }
    }

    /// `http://HOST:PORT`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.program.port)
    }

    /// What squid answers itself, as long as it is well.
    pub fn ping(&self) -> String {
        format!("{}/squid-internal-static/icons/SN.png", self.url())
    }

    /// What it has passed on, or refused to, in the order of the ends.
    pub fn passed(&self) -> Vec<Passed> {
        let read = |line: &str| {
            // TIME DURATION CLIENT OUTCOME BYTES METHOD TARGET USER ...
            let mut words = line.split_whitespace().skip(3);
            let outcome = words.next()?.to_owned();
            Some(Passed { outcome, method: words.nth(1)?.to_owned(), target: words.next()?.to_owned() })
        };
        let internal = |passed: &Passed| passed.target.contains("/squid-internal-static/");
        self.program.read("access").lines().filter_map(read).filter(|passed| !internal(passed)).collect()
    }

    pub fn kill(&mut self) {
        self.program.kill();
    }

    pub fn start_again(&mut self) {
        self.program.start_again();
    }
}

fn service(port: u16) -> String {
    format!("test{port}")
}

impl Drop for Squid {
    fn drop(&mut self) {
        self.program.kill();
        for part in ["metadata", "queues", "readers"] {
            // Killed, it leaves them; not every version makes all of them.
            let _ = fs::remove_file(format!("/dev/shm/{}-cf__{part}.shm", service(self.program.port)));
        }
    }
}

/// What looks passwords up for squid; in its package.
const HELPER: &str = "/usr/lib/squid/basic_ncsa_auth";

/// Whether squid can have passwords here.
pub fn knows_passwords() -> bool {
    Path::new(HELPER).is_file() && find("htpasswd").is_some()
}
