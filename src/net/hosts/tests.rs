use super::*;

fn load(dir: &Path, registry: &str) -> Result<RegistryHosts, HostsError> {
    find(&Registries::default(), dir, registry)
}

fn read(registry: &str, text: &str) -> RegistryHosts {
    table::read_text(text, registry, Path::new("/etc/d")).unwrap().hosts.unwrap()
}

fn bases(hosts: &RegistryHosts) -> Vec<&str> {
    hosts.hosts.iter().map(|host| host.base.as_str()).collect()
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_origin_last() {
    let hosts = read(
        "docker.io",
        "[host.\"https://z.example\"]\n[host.\"http://a.example:5000/mirror\"]\n[host.\"m.example/x/v2/\"]\n\
         [host.\"https://o.example/own\"]\noverride_path = true\n",
    );

    assert_eq!(
        bases(&hosts),
        [
            "https://z.example/v2",
            "http://a.example:5000/mirror/v2",
            "https://m.example/x/v2",
            "https://o.example/own",
            "https://registry-1.docker.io/v2",
        ]
    );
    assert_eq!(hosts.hosts[0].namespace("docker.io"), Some("docker.io"));
    assert_eq!(hosts.hosts[4].namespace("docker.io"), None);
}

#[test]
fn everything_that_containerd_documents_is_understood() {
    let hosts = read(
        "r.example",
        "server = \"https://upstream.example\"\nca = \"root.pem\"\n\
         [host.\"https://m.example\"]\ncapabilities = [\"pull\"]\nca = [\"a.pem\", \"/abs/b.pem\"]\n\
         client = [[\"c.pem\", \"c.key\"], \"both.pem\", [\"d.pem\", \"\"]]\nskip_verify = true\ndial_timeout = \"2s\"\n\
         [host.\"https://m.example\".header]\nx-one = \"1\"\nx-two = [\"2\", \"3\"]\n",
    );

    assert_eq!(bases(&hosts), ["https://m.example/v2", "https://upstream.example/v2"]);
    let mirror = &hosts.hosts[0];
    assert_eq!((mirror.pull, mirror.resolve, mirror.skip_verify), (true, false, true));
    assert_eq!(mirror.ca, [Path::new("/etc/d/a.pem"), Path::new("/abs/b.pem")]);
    let pair = |cert: &str, key: Option<&str>| IdentityFiles { cert: cert.into(), key: key.map(Into::into) };
    assert_eq!(
        mirror.clients,
        [pair("/etc/d/c.pem", Some("/etc/d/c.key")), pair("/etc/d/both.pem", None), pair("/etc/d/d.pem", None),]
    );
    assert_eq!(mirror.dial_timeout, Some(Duration::from_secs(2)));
    let headers: Vec<_> = mirror.headers.iter().map(|(name, value)| format!("{name}: {}", value.expose())).collect();
    assert_eq!(headers, ["x-one: 1", "x-two: 2", "x-two: 3"]);
    assert_eq!(hosts.hosts[1].ca, [Path::new("/etc/d/root.pem")]);
}

#[test]
fn what_containerd_does_not_know_is_in_a_table_of_its_own() {
    let hosts = read(
        "r.example",
        "[rafsd]\nconcurrency = 8\n[host.\"http://127.0.0.1:65001\".rafsd]\nalign = \"4MiB\"\n\
         proxy = \"http://u:hunter2@p:3128\"\nproxy_fallback = false\nproxy_ping = \"http://p/ping\"\nbandwidth = \"10MiB\"\n",
    );

    let peer = &hosts.hosts[0];
    assert_eq!((peer.align, peer.limits.bandwidth), (Some(4 << 20), Some(10 << 20)));
    assert_eq!(peer.proxy, ProxyUse::Through(Secret::new("http://u:hunter2@p:3128/")));
    assert!(!peer.proxy_fallback && peer.proxy_ping.is_some());
    assert!(!format!("{peer:?}").contains("hunter2"), "a proxy may want a login, which is never shown");
    assert_eq!(hosts.hosts[1].limits.concurrency, Some(8));
}

#[test]
fn all_mistakes_are_told_with_their_lines_and_unknown_keys_apart() {
    let text = "server = 1\nfuture = true\n[host.\"ftp://x\"]\n[host.\"https://u:hunter2@m\"]\n[host.\"https://m\"]\n\
                capabilities = [\"fly\"]\nclient = [[\"a\"]]\ndial_timeout = \"soon\"\nsoon = 1\n[host.\"https://m\".rafsd]\n\
                align = \"5KiB\"\nconcurrency = 0\nx = 1\n[host.\"https://m\".header]\n\"a b\" = \"x\"\nok = \"a\\nhunter2\"\n";
    let read = table::read_text(text, "r.example", Path::new("/")).unwrap();

    let mut notes = read.hosts.unwrap_err();
    notes.sort_by_key(|note| note.line);
    let told: Vec<_> = notes.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "line 1: server must be a string",
            "line 3: \"ftp://x\" is not a host or an http or https URL",
            "line 4: \"m\" is not a host or an http or https URL",
            "line 6: unknown capability \"fly\"",
            "line 7: client must be a path, or a list of paths and of pairs of a certificate and a key",
            "line 8: dial_timeout must be a length of time such as 3s",
            "line 11: align must be a power of two from 4KiB to 64MiB",
            "line 12: concurrency must be a number from 1 to 1024",
            "line 13: unknown key \"x\"; rafsd has align, redirects, proxy, proxy_fallback, proxy_ping, concurrency and bandwidth",
            "line 15: \"a b\" is not the name of a header",
            "line 16: the value of ok cannot be sent",
        ]
    );
    let unknown: Vec<_> = read.unknown.iter().map(ToString::to_string).collect();
    assert_eq!(unknown, ["line 2: unknown key \"future\"", "line 9: unknown key \"soon\""]);
}

#[test]
fn a_registry_of_this_very_host_is_asked_without_tls() {
    for (registry, base) in [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("quay.io:5000", "https://quay.io:5000/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("localhost", "https://localhost/v2"),
        ("localhost:443", "https://localhost/v2"),
    ] {
        assert_eq!(bases(&RegistryHosts::plain(registry).unwrap()), [base], "{registry}");
    }
    for registry in ["", "a/b", "u@h", "a?b", "a#b", "a b"] {
        assert!(RegistryHosts::plain(registry).is_err(), "{registry:?}");
    }
}

#[test]
fn directories_are_looked_for_as_containerd_does() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, server: &str| {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("hosts.toml"), format!("server = \"{server}\"\n")).unwrap();
    };
    let asked = |registry: &str| load(dir.path(), registry).unwrap().hosts[0].base.to_string();
    assert_eq!(asked("r.example:5000"), "https://r.example:5000/v2");

    for (name, found) in [("_default", "d"), ("r.example:5000", "colon"), ("r.example_5000_", "underscores")] {
        write(name, found);
        assert_eq!(asked("r.example:5000"), format!("https://{found}/v2"));
    }
    assert_eq!(asked("other.example"), "https://d/v2");
    assert_eq!(load(&dir.path().join("nowhere"), "r.example").unwrap(), RegistryHosts::plain("r.example").unwrap());
}

#[test]
fn dockers_certificates_are_found_by_their_endings() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("r.example");
    std::fs::create_dir(&folder).unwrap();
    for name in ["ca.crt", "me.cert", "me.key", "notes.txt"] {
        std::fs::write(folder.join(name), "").unwrap();
    }

    let hosts = load(dir.path(), "r.example").unwrap();

    assert_eq!(hosts.hosts[0].ca, [folder.join("ca.crt")]);
    assert_eq!(
        hosts.hosts[0].clients,
        [IdentityFiles { cert: folder.join("me.cert"), key: Some(folder.join("me.key")) }]
    );
}

#[test]
fn a_file_with_mistakes_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("r.example")).unwrap();
    let file = dir.path().join("r.example/hosts.toml");
    std::fs::write(&file, "server = \n").unwrap();

    let error = load(dir.path(), "r.example").unwrap_err().to_string();

    assert!(error.starts_with(&format!("cannot use {}: line 1: ", file.display())), "{error}");
}

#[test]
fn hostile_text_is_refused_and_survived() {
    for text in
        ["[host]\nx = 1", "host = 1", "[[host]]", "= =", &("a = ".to_owned() + &"[".repeat(100_000)), "rafsd = 1"]
    {
        let read = table::read_text(text, "r.example", Path::new("/")).unwrap();
        assert!(read.hosts.is_err(), "{}", &text[..text.len().min(20)]);
    }
}

fn own(text: &str) -> Registries {
    let (table, errors) = toml::de::DeTable::parse_recoverable(text);
    assert!(errors.is_empty(), "{errors:?}");
    let (registries, wrong) = Registries::read(table.get_ref(), text, Path::new("/etc/d"));
    assert_eq!(wrong, []);
    registries
}

#[test]
fn our_own_tables_go_before_the_directory_and_names_before_what_is_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let asked = |own: &Registries, registry: &str| -> Vec<_> {
        let hosts = find(own, dir.path(), registry).unwrap().hosts;
        hosts.iter().map(|host| host.base.host_str().unwrap().to_owned()).collect()
    };
    let all = own("[_default.host.\"https://for.all\"]\n");
    let named = own("[\"r.example\".host.\"https://own.mirror\"]\n[_default.host.\"https://for.all\"]\n");
    assert_eq!(asked(&all, "r.example"), ["for.all", "r.example"]);

    for (name, server) in [("_default", "dir.all"), ("r.example", "dir.named")] {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("hosts.toml"), format!("server = \"{server}\"\n")).unwrap();
    }

    assert_eq!(asked(&Registries::default(), "r.example"), ["dir.named"]);
    assert_eq!(asked(&Registries::default(), "other.example"), ["dir.all"]);
    assert_eq!(asked(&all, "r.example"), ["dir.named"]);
    assert_eq!(asked(&all, "other.example"), ["for.all", "other.example"]);
    assert_eq!(asked(&all, "docker.io"), ["for.all", "registry-1.docker.io"]);
    assert_eq!(asked(&named, "r.example"), ["own.mirror", "r.example"]);
    assert_eq!(asked(&own("[_default]\nserver = \"https://one\"\n"), "other.example"), ["one"]);
}

#[test]
fn a_registry_is_found_by_whichever_of_its_names_it_was_told_of() {
    let text = "[\"registry-1.docker.io\".rafsd]\nproxy = \"http://p:3128\"\nproxy_fallback = false\n\
                [\"LOCALHOST:25510\".rafsd]\nconcurrency = 3\n";
    let own = own(text);
    let origin = |registry: &str| find(&own, Path::new("/nowhere"), registry).unwrap().hosts.pop().unwrap();

    for name in ["docker.io", "index.docker.io", "registry-1.docker.io", "Registry.Docker.io"] {
        let host = origin(name);
        assert_eq!(host.base.as_str(), "https://registry-1.docker.io/v2", "{name}");
        assert_eq!(host.proxy, ProxyUse::Through(Secret::new("http://p:3128/")), "{name}");
        assert!(!host.proxy_fallback, "{name}");
        assert_eq!(host.namespace(name), None, "{name}");
    }
    assert_eq!(origin("localhost:25510").base.as_str(), "http://localhost:25510/v2");
    assert_eq!(origin("localhost:25510").limits.concurrency, Some(3));
    assert!(own.written_whole().contains("[registry.\"docker.io\"]"));
}

#[test]
fn what_is_about_a_proxy_has_no_effect_without_one() {
    let told = |ours: &str| {
        let text = format!("[rafsd]\n{ours}");
        let read = table::read_text(&text, "r.example", Path::new("/")).unwrap();
        assert!(read.hosts.is_ok(), "containerd's file is used all the same");
        let text = format!("[\"r.example\".rafsd]\n{ours}");
        let (_, wrong) = Registries::read(toml::de::DeTable::parse(&text).unwrap().get_ref(), &text, Path::new("/"));
        assert_eq!(wrong.len(), read.unknown.len(), "a mistake in our own file: {wrong:?}");
        read.unknown.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let fallback = |line: u8| format!("line {line}: proxy_fallback has no effect without proxy = \"URL\"");

    assert_eq!(told("proxy_fallback = false\n"), [fallback(2)]);
    assert_eq!(told("proxy = \"environment\"\nproxy_fallback = false\n"), [fallback(3)]);
    assert_eq!(
        told("proxy = \"none\"\nproxy_ping = \"http://p\"\n"),
        ["line 3: proxy_ping has no effect without proxy = \"URL\""]
    );
    assert_eq!(told("proxy_fallback = true\n"), [""; 0]);
    assert_eq!(told("proxy = \"http://p\"\nproxy_fallback = false\nproxy_ping = \"http://p\"\n"), [""; 0]);
}

#[test]
fn two_names_of_one_registry_are_a_mistake() {
    let text = "[\"registry-1.docker.io\"]\n[\"R.example\"]\n[\"docker.io\"]\n[\"r.example\"]\n[_default]\n";
    let table = toml::de::DeTable::parse(text).unwrap();

    let (registries, wrong) = Registries::read(table.get_ref(), text, Path::new("/etc/d"));

    let told: Vec<_> = wrong.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "line 3: registry \"docker.io\": that is the registry \"registry-1.docker.io\", which has a table already",
            "line 4: registry \"r.example\": that is the registry \"R.example\", which has a table already",
        ]
    );
    assert_eq!(registries.len(), 3);
}

#[test]
fn what_is_written_is_read_as_the_same_registries() {
    let text = "[\"docker.io\"]\nca = [\"root.pem\"]\n[\"docker.io\".rafsd]\nproxy = \"none\"\n\
                [\"docker.io\".host.\"http://z.example:5000/x\"]\ncapabilities = [\"pull\"]\nskip_verify = true\n\
                client = [[\"c.pem\", \"c \\\"q\\\".key\"], \"both.pem\"]\ndial_timeout = \"250ms\"\noverride_path = true\n\
                [\"docker.io\".host.\"http://z.example:5000/x\".header]\nx-a = \"hunter2\"\nx-b = [\"1\", \"2\"]\n\
                [\"docker.io\".host.\"http://z.example:5000/x\".rafsd]\nalign = \"4MiB\"\nconcurrency = 3\n\
                bandwidth = \"10MiB\"\nredirects = [\"s.lan\"]\nproxy = \"http://u:hunter2@p:3128\"\nproxy_ping = \"http://p/ping\"\n\
                proxy_fallback = false\n[\"docker.io\".host.\"a.example\"]\ncapabilities = [\"push\"]\n\
                [_default.host.\"https://for.all\"]\ncapabilities = [\"resolve\"]\n";
    let registries = own(text);
    let again = |written: String| {
        let (table, errors) = toml::de::DeTable::parse_recoverable(&written);
        assert!(errors.is_empty(), "{errors:?} in {written}");
        let toml::de::DeValue::Table(tables) = table.get_ref().get("registry").unwrap().get_ref() else { panic!() };
        let (registries, wrong) = Registries::read(tables, &written, Path::new("/elsewhere"));
        assert_eq!(wrong, []);
        registries
    };

    assert_eq!(again(registries.written_whole()), registries);
    let hidden = registries.written();
    assert!(!hidden.contains("hunter2") && !registries.printed().to_string().contains("hunter2"), "{hidden}");
    assert_eq!(again(hidden).len(), 2);
    let printed = &registries.printed()["docker.io"];
    assert_eq!(
        (&printed[0]["host"], &printed[0]["rafsd"]["concurrency"]),
        (&"http://z.example:5000/x".into(), &3.into())
    );
    assert_eq!(printed[2]["host"], "https://registry-1.docker.io/v2");
    let all = &registries.printed()["_default"];
    assert_eq!((&all[0]["host"], &all[1]["host"]), (&"https://for.all/v2".into(), &serde_json::Value::Null));
    assert_eq!(Registries::default().written_whole(), "");
}
