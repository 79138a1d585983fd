//! One name for each registry, whichever of its names is used.
//!
//! Hosts are the same in capitals and in small letters, and Docker's registry has had several. Whoever looks
//! something up by the name of a registry, or compares two, has to go by this one.

/// What Docker's registry is called here.
pub const DOCKER: &str = "docker.io";

/// What else it is called.
const ALIASES: [&str; 3] = ["index.docker.io", "registry-1.docker.io", "registry.docker.io"];

/// The one name of the registry `host`, which is `HOST[:PORT]`: in small letters, and [`DOCKER`] for all of
/// Docker's.
pub fn canonical(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if ALIASES.contains(&host.as_str()) { DOCKER.to_owned() } else { host }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_registry_has_one_name() {
        for (host, name) in [
            ("docker.io", "docker.io"),
            ("Docker.IO", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("Registry-1.docker.io", "docker.io"),
            ("registry.docker.io", "docker.io"),
            ("auth.docker.io", "auth.docker.io"),
            ("docker.io:5000", "docker.io:5000"),
            ("LOCALHOST:25510", "localhost:25510"),
            ("[::F]:1", "[::f]:1"),
            ("*.Example", "*.example"),
        ] {
            assert_eq!(canonical(host), name, "{host}");
        }
    }
}
