//! Configurations and results as they are found, and plugins as they behave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::chain::derive;
use crate::Error;
use crate::cancel::Cancel;

use super::{AddResult, Attachment, Chain, NetworkList, Plugins, Valid, Version, load};

fn list(text: &Value) -> NetworkList {
    NetworkList::parse(Path::new("10-test.conflist"), text.to_string().as_bytes()).unwrap()
}

fn refusal(text: &str) -> String {
    NetworkList::parse(Path::new("10-test.conflist"), text.as_bytes()).unwrap_err().to_string()
}

#[test]
fn a_list_and_a_single_plugin_are_read() {
    let read = list(&json!({ "cniVersion": "0.4.0", "name": "net", "disableCheck": "true",
                             "plugins": [{ "type": "bridge" }, { "type": "portmap" }] }));
    assert_eq!((read.version, read.disable_check, read.plugins.len()), (Version::V0_4_0, true, 2));
    let single = list(&json!({ "cniVersion": "0.3.1", "name": "net", "type": "bridge", "bridge": "b0" }));
    assert_eq!((single.plugins.len(), NetworkList::kind(&single.plugins[0])), (1, "bridge"));
}

#[test]
fn the_highest_version_that_both_know_is_taken() {
    let read = list(&json!({ "cniVersion": "0.4.0", "cniVersions": ["0.3.1", "1.0.0", "9.0.0"], "name": "n",
                             "type": "bridge" }));
    assert_eq!(read.version, Version::V1_0_0);
}

#[test]
fn what_is_wrong_with_a_configuration_is_named_with_its_file() {
    for (text, word) in [
        ("", "JSON"),
        ("[]", "object"),
        (r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "name"),
        (r#"{"cniVersion":"1.0.0","name":"/x","plugins":[{"type":"a"}]}"#, "/x"),
        (r#"{"cniVersion":"0.1.0","name":"n","plugins":[{"type":"a"}]}"#, "0.1.0"),
        (r#"{"name":"n","plugins":[{"type":"a"}]}"#, "cniVersion"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#, "plugins"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../a"}]}"#, "plugins[0].type"),
        (r#"{"cniVersion":"1.0.0","name":"n","plugins":[7]}"#, "plugins[0]"),
    ] {
        let error = refusal(text);
        assert!(error.contains(word) && error.contains("10-test.conflist"), "{text}: {error}");
    }
}

#[test]
fn the_first_files_in_lexical_order_count() {
    let directory = tempfile::tempdir().unwrap();
    let error = load(directory.path(), 1).unwrap_err().to_string();
    assert!(error.contains("install a network plugin"), "{error}");
    let config = |name: &str| json!({ "cniVersion": "1.0.0", "name": name, "type": "bridge" }).to_string();
    for (file, name) in [("20-b.conf", "b"), ("10-a.conflist", "a"), ("00-note.txt", "no"), ("30-c.json", "c")] {
        fs::write(directory.path().join(file), config(name)).unwrap();
    }
    let names = |limit| load(directory.path(), limit).unwrap().into_iter().map(|list| list.name).collect::<Vec<_>>();
    assert_eq!(names(1), ["a"]);
    assert_eq!(names(9), ["a", "b", "c"]);
    fs::write(directory.path().join("05-bad.conf"), "{").unwrap();
    assert!(load(directory.path(), 1).unwrap_err().to_string().contains("05-bad.conf"));
}

#[test]
fn a_plugin_gets_its_own_configuration_and_what_it_can_make_use_of() {
    let read = list(&json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{
        "type": "portmap", "snat": true, "prevResult": 1, "cni.dev/x": 1,
        "capabilities": { "portMappings": true, "bandwidth": false, "dns": true }
    }] }));
    let capabilities = Map::from_iter([("portMappings".into(), json!([1])), ("bandwidth".into(), json!({}))]);
    let previous = json!({ "ips": [] });
    let config = Value::from(derive(&read, &read.plugins[0], &capabilities, Some(&previous)));
    assert_eq!(
        config,
        json!({ "type": "portmap", "snat": true, "name": "net", "cniVersion": "1.0.0",
                "runtimeConfig": { "portMappings": [1] }, "prevResult": { "ips": [] } })
    );
    let config = derive(&read, &read.plugins[0], &Map::new(), None);
    assert!(!config.contains_key("runtimeConfig") && !config.contains_key("prevResult"));
}

#[test]
fn results_of_every_version_are_understood() {
    let old = json!({ "cniVersion": "0.3.1",
        "interfaces": [{ "name": "cni0" }, { "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x" }],
        "ips": [{ "version": "4", "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1 },
                { "version": "6", "address": "fd00::5/64", "interface": 1 },
                { "version": "4", "address": "10.9.0.1/16", "interface": 0 }] });
    let result = AddResult::parse(&old).unwrap();
    assert_eq!(result.addresses("eth0").iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.1.0.5", "fd00::5"]);
    assert_eq!(result.in_sandbox().collect::<Vec<_>>(), ["eth0"]);
    let bare = AddResult::parse(&json!({ "ips": [{ "address": "10.1.0.5/16" }], "dns": {} })).unwrap();
    assert_eq!(bare.addresses("eth0").len(), 1);
    assert!(AddResult::parse(&json!({ "ips": [{ "address": "10.1.0.5/33" }] })).unwrap_err().contains("10.1.0.5/33"));
    assert!(AddResult::parse(&json!({ "ips": 7 })).is_err());
}

/// A plugin that appends its command and configuration to a file beside it and does the
/// rest of `script`.
fn plugin(directory: &Path, name: &str, script: &str) {
    let path = directory.join(name);
    let log = directory.join("log");
    let text = format!(
        "#!/bin/sh\nconfig=$(cat)\necho \"{name} $CNI_COMMAND $CNI_IFNAME $config\" >>{}\n{script}\n",
        log.display()
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn attachment(kinds: &[&str]) -> Attachment {
    let plugins: Vec<_> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    let list = list(&json!({ "cniVersion": "1.0.0", "name": "net", "plugins": plugins }));
    Attachment::new(list, "eth0".into(), "c".into(), String::new(), Map::new())
}

fn plugins(directory: &Path, seconds: u64) -> Plugins {
    Plugins {
        directories: vec!["/nonexistent".into(), directory.into()],
        limit: Duration::from_secs(seconds),
        until: None,
        cancel: None,
    }
}

#[test]
fn results_go_from_plugin_to_plugin_and_back_in_reverse() {
    let directory = tempfile::tempdir().unwrap();
    plugin(
        directory.path(),
        "one",
        r#"[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}'"#,
    );
    plugin(
        directory.path(),
        "two",
        r#"[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.3/24"}]}'"#,
    );
    let plugins = plugins(directory.path(), 20);
    let (chain, mut attachment) = (Chain::new(&plugins), attachment(&["one", "two"]));
    let result = chain.add(&mut attachment, "/run/netns/x").unwrap();
    assert_eq!(result.addresses("eth0"), [std::net::IpAddr::from([10, 0, 0, 3])]);
    assert!(chain.check(&attachment, "/run/netns/x").iter().all(|(_, said)| said.is_ok()));
    assert!(chain.del(&mut attachment, "").is_empty());
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    let calls: Vec<_> = log.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(calls, ["one ADD", "two ADD", "one CHECK", "two CHECK", "two DEL", "one DEL"]);
    let previous: Vec<_> = log.lines().map(|line| line.contains("10.0.0.2")).collect();
    assert_eq!(previous[..2], [false, true], "the second plugin knows the result of the first");
    assert!(log.lines().skip(2).all(|line| line.contains("10.0.0.3")), "later commands know the last result");
}

#[test]
fn a_failure_is_told_in_the_plugins_own_words() {
    let directory = tempfile::tempdir().unwrap();
    plugin(directory.path(), "json", r#"echo '{"code":11,"msg":"try later","details":"pool is empty"}'; exit 1"#);
    plugin(directory.path(), "words", "echo out of luck >&2; exit 3");
    plugin(directory.path(), "mute", "exit 4");
    plugin(directory.path(), "garbage", "echo no json");
    plugin(directory.path(), "slow", "sleep 100 & sleep 100");
    let plugins = plugins(directory.path(), 1);
    for (kind, words) in [
        ("json", vec!["\"json\"", "try later; pool is empty", "code 11"]),
        ("words", vec!["out of luck", "3"]),
        ("mute", vec!["it said nothing", "4"]),
        ("garbage", vec!["no JSON"]),
        ("slow", vec!["within 1s", "plugin_seconds"]),
        ("absent", vec!["absent", "/nonexistent", "install"]),
    ] {
        let error = Chain::new(&plugins).add(&mut attachment(&[kind]), "").unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains("\"net\""), "{kind}: {error}");
    }
    let failures = Chain::new(&plugins).del(&mut attachment(&["absent"]), "");
    assert!(failures.is_empty(), "what is not installed can undo nothing");
}

#[test]
fn a_plugin_that_hangs_ends_when_it_is_asked_to_and_when_all_have_to_have_ended() {
    let directory = tempfile::tempdir().unwrap();
    let started = directory.path().join("started");
    plugin(directory.path(), "slow", &format!("touch {}; sleep 1000 & sleep 1000", started.display()));
    let cancel = Arc::new(Cancel::new().unwrap());
    let hanging = Plugins { cancel: Some(cancel.clone()), ..plugins(directory.path(), 1000) };
    let adding = thread::spawn(move || Chain::new(&hanging).add(&mut attachment(&["slow"]), ""));
    while !started.exists() {
        assert!(!adding.is_finished());
        thread::yield_now();
    }
    cancel.ask();
    assert!(matches!(adding.join().unwrap(), Err(Error::Cancelled)));
    let late = Plugins { until: Some(Instant::now()), ..plugins(directory.path(), 1000) };
    let error = Chain::new(&late).add(&mut attachment(&["slow"]), "").unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn what_a_plugin_leaves_behind_holds_nobody_up_and_what_it_says_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    // The child has the plugin's output, and is not killed with it: it has a session of its own.
    let child = directory.path().join("child");
    let script = format!("setsid sh -c 'echo $$ >{0}.new; mv {0}.new {0}; exec sleep 1000' &", child.display());
    plugin(directory.path(), "leaves", &format!("{script}\nuntil [ -e {} ]; do :; done; exit 0", child.display()));
    let plugins = plugins(directory.path(), 500);
    assert!(Chain::new(&plugins).del(&mut attachment(&["leaves"]), "").is_empty());
    let pid: i32 = fs::read_to_string(&child).unwrap().trim().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();

    let long = r#"printf '{"code":7,"msg":"%s"}' $(head -c 70000 /dev/zero | tr '\0' x)end; exit 1"#;
    plugin(directory.path(), "talks", long);
    let error = Chain::new(&plugins).add(&mut attachment(&["talks"]), "").unwrap_err().to_string();
    assert!(error.len() < 2000 && error.contains("end (code 7)"), "{error}");
}

#[test]
fn every_plugin_is_asked_whatever_the_others_say_and_none_undoes_twice() {
    let directory = tempfile::tempdir().unwrap();
    let refuses = |name: &str| {
        format!(
            r#"[ -e {0}/repaired ] || {{ echo '{{"code":11,"msg":"{name} is out"}}'; exit 1; }}"#,
            directory.path().display()
        )
    };
    let added = r#"[ $CNI_COMMAND != ADD ] || { echo '{"cniVersion":"1.0.0"}'; exit 0; }"#;
    for (name, script) in [
        ("one", String::new()),
        ("two", refuses("two")),
        ("three", "sleep 1000".into()),
        ("four", r#"echo '{"code":3,"msg":"what container?"}'; exit 1"#.into()),
    ] {
        plugin(directory.path(), name, &format!("{added}\n{script}"));
    }
    let plugins = plugins(directory.path(), 1);
    let (chain, mut attachment) = (Chain::new(&plugins), attachment(&["one", "two", "three", "absent", "four"]));
    attachment.result = Some(json!({}));
    let words = |said: Vec<Error>| said.iter().map(ToString::to_string).collect::<Vec<_>>();
    let checked = chain.check(&attachment, "");
    assert_eq!(checked.iter().map(|(_, said)| said.is_ok()).collect::<Vec<_>>(), [true, false, false, false, false]);
    let failures = words(chain.del(&mut attachment, ""));
    assert!(
        matches!(&failures[..], [three, two] if three.contains("\"three\"") && two.contains("two is out")),
        "{failures:?}"
    );

    fs::remove_file(directory.path().join("log")).unwrap();
    fs::write(directory.path().join("repaired"), "").unwrap();
    plugin(directory.path(), "three", "");
    // What is on record is what counts.
    let mut attachment: Attachment = serde_json::from_value(json!(attachment)).unwrap();
    assert!(chain.del(&mut attachment, "").is_empty());
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    let calls: Vec<_> = log.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(calls, ["three DEL", "two DEL"]);
}

#[test]
fn a_plugin_does_not_inherit_how_the_kernel_spares_the_daemon() {
    let directory = tempfile::tempdir().unwrap();
    plugin(
        directory.path(),
        "one",
        &format!("cat /proc/self/oom_score_adj >{}", directory.path().join("score").display()),
    );
    let own = "/proc/self/oom_score_adj";
    let before = fs::read_to_string(own).unwrap();
    // Another value than nobody's: less takes a right that this test may lack.
    fs::write(own, "300").unwrap();
    let failures = Chain::new(&plugins(directory.path(), 20)).del(&mut attachment(&["one"]), "");
    fs::write(own, before).unwrap();
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(fs::read_to_string(directory.path().join("score")).unwrap().trim(), "0");
}

#[test]
fn commands_of_a_later_version_are_not_sent_to_earlier_ones() {
    let directory = tempfile::tempdir().unwrap();
    plugin(
        directory.path(),
        "one",
        "[ $CNI_COMMAND != STATUS ] || { echo '{\"code\":50,\"msg\":\"not yet\"}'; exit 1; }",
    );
    let plugins = plugins(directory.path(), 20);
    let chain = Chain::new(&plugins);
    let mut attachment = attachment(&["one"]);
    chain.status(&attachment.list).unwrap();
    chain.gc(&attachment.list, &[]).unwrap();
    assert!(!directory.path().join("log").exists());
    attachment.list.version = Version::V1_1_0;
    let error = chain.status(&attachment.list).unwrap_err().to_string();
    assert!(error.contains("not yet") && error.contains("STATUS"), "{error}");
    let valid = Valid { container_id: "c".into(), interface: "eth0".into() };
    chain.gc(&attachment.list, &[valid]).unwrap();
    let log = fs::read_to_string(directory.path().join("log")).unwrap();
    assert!(log.contains(r#""cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]"#), "{log}");
    attachment.list.disable_gc = true;
    chain.gc(&attachment.list, &[]).unwrap();
    assert_eq!(fs::read_to_string(directory.path().join("log")).unwrap(), log);
}

proptest! {
    #[test]
    fn no_text_panics_the_readers(text in ".*", key in "[a-zA-Z]{1,12}", value in ".{0,20}") {
        let _ = NetworkList::parse(Path::new("x"), text.as_bytes());
        let object = json!({ "cniVersion": "1.0.0", "name": "n", "type": "a", key.clone(): value.clone() });
        let _ = NetworkList::parse(Path::new("x"), object.to_string().as_bytes());
        let _ = AddResult::parse(&json!({ key: value.clone(), "ips": [{ "address": value }] }));
    }
}
