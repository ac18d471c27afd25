use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use rustix::fs::mknodat;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use tempfile::TempDir;

use super::*;

/// A trusted directory, and one outside that holds `secret`.
fn place() -> (TempDir, Directory, TempDir) {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir_all(outside.path().join("a/b")).unwrap();
    fs::write(outside.path().join("a/b/secret"), "secret").unwrap();
    let directory = Directory::open(inside.path()).unwrap();
    (inside, directory, outside)
}

/// Everything that can be asked of a directory, by one name.
fn everything(directory: &Directory, name: &str) -> Vec<(&'static str, Result<()>)> {
    vec![
        ("directory", directory.directory(name).map(drop)),
        ("create_directories", directory.create_directories(format!("{name}/new"), 0o755).map(drop)),
        ("open", directory.file(name, OFlags::RDWR, 0).map(drop)),
        ("create", directory.file(name, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC, 0o600).map(drop)),
        ("create below", directory.file(format!("{name}/new"), OFlags::RDWR | OFlags::CREATE, 0o600).map(drop)),
        ("read", directory.read(name, 100).map(drop)),
        ("socket", directory.socket(name).map(drop)),
        ("replace below", directory.replace(format!("{name}/new"), b"x", 0o600)),
        ("remove below", directory.remove_file(format!("{name}/secret")).map(drop)),
        ("remove tree below", directory.remove_tree(format!("{name}/secret")).map(drop)),
    ]
}

/// That the directory outside is as it was.
fn untouched(outside: &TempDir) {
    let names = |path: &str| fs::read_dir(outside.path().join(path)).unwrap().count();
    assert_eq!((names("."), names("a"), names("a/b")), (1, 1, 1));
    assert_eq!(fs::read(outside.path().join("a/b/secret")).unwrap(), b"secret");
}

#[test]
fn a_link_is_followed_at_no_component() {
    for (link, target, name) in
        [("x", "a/b", "x"), ("x", "a", "x/b"), ("d/x", "a/b", "d/x"), ("x", "a/b/secret", "x"), ("x", "gone", "x")]
    {
        let (inside, directory, outside) = place();
        fs::create_dir(inside.path().join("d")).unwrap();
        symlink(outside.path().join(target), inside.path().join(link)).unwrap();
        for (what, result) in everything(&directory, name) {
            let error = result.expect_err(what).to_string();
            let (link, other) = (error.contains("symbolic link"), error.contains("Not a directory"));
            assert!((link || other) && error.contains(name), "{what} of {name}: {error}");
        }
        untouched(&outside);
        assert!(!outside.path().join("gone").exists());
        // The link itself is what is replaced and removed.
        let link = fs::symlink_metadata(inside.path().join(link)).unwrap();
        assert!(link.is_symlink());
    }
}

#[test]
fn a_link_within_the_directory_is_not_followed_either() {
    let (inside, directory, _outside) = place();
    fs::write(inside.path().join("own"), "own").unwrap();
    symlink("own", inside.path().join("link")).unwrap();
    directory.read("link", 10).unwrap_err();
    assert_eq!(directory.stat("link").unwrap().unwrap().st_size, 3, "the link's");
    directory.replace("link", b"new", 0o600).unwrap();
    assert_eq!(fs::read(inside.path().join("own")).unwrap(), b"own");
    assert_eq!(directory.read("link", 10).unwrap(), b"new");
}

#[test]
fn what_leads_upwards_is_no_name() {
    let (inside, directory, _outside) = place();
    fs::create_dir(inside.path().join("sub")).unwrap();
    let sub = directory.directory("sub").unwrap();
    let neighbour = inside.path().join("neighbour");
    fs::write(&neighbour, "neighbour").unwrap();
    for name in ["../neighbour", "..", "/etc/hostname", "", ".", "x/../../neighbour", "./../neighbour"] {
        for (what, result) in everything(&sub, name) {
            // An empty name in front of a slash is the root.
            assert!(result.is_err(), "{what} of {name:?}");
        }
        sub.replace(name, b"x", 0o600).unwrap_err();
        sub.remove_file(name).unwrap_err();
        sub.remove_tree(name).unwrap_err();
        sub.stat(name).unwrap_err();
    }
    assert_eq!(fs::read(&neighbour).unwrap(), b"neighbour");
    assert_eq!(sub.names(1).unwrap(), [""; 0]);
}

#[test]
fn what_is_no_regular_file_is_neither_opened_nor_waited_for() {
    let (inside, directory, _outside) = place();
    mknodat(CWD, inside.path().join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _listener = UnixListener::bind(inside.path().join("socket")).unwrap();
    fs::create_dir(inside.path().join("directory")).unwrap();
    let mut kinds = vec![("fifo", "named pipe"), ("socket", "socket"), ("directory", "directory")];
    // Takes root. Without an open of it nothing tells that it is none: number 0 has no driver, and opening would be ENXIO.
    if mknodat(CWD, inside.path().join("device"), FileType::CharacterDevice, Mode::RUSR, 0).is_ok() {
        kinds.push(("device", "device"));
    }
    for (name, kind) in kinds {
        for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::CREATE | OFlags::APPEND] {
            let error = directory.file(name, flags, 0o600).unwrap_err().to_string();
            assert!(error.contains(&format!("it is a {kind}, and a regular file is wanted")), "{error}");
        }
        directory.read(name, 10).unwrap_err();
        if name != "socket" {
            let error = directory.socket(name).unwrap_err().to_string();
            assert!(error.contains("a socket is wanted"), "{error}");
        }
    }
}

#[test]
fn reads_and_lists_are_bounded() {
    let (inside, directory, _outside) = place();
    let sparse = File::create(inside.path().join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    let error = directory.read("sparse", 1 << 20).unwrap_err().to_string();
    assert!(error.contains("larger than 1048576 bytes"), "{error}");
    sparse.set_len(3).unwrap();
    assert_eq!(directory.read("sparse", 3).unwrap(), [0; 3]);
    directory.read("sparse", 2).unwrap_err();
    for name in ["a", "b"] {
        fs::write(inside.path().join(name), "").unwrap();
    }
    assert_eq!(directory.names(3).unwrap().len(), 3);
    let error = directory.names(2).unwrap_err().to_string();
    assert!(error.contains("more than 2 entries"), "{error}");
}

#[test]
fn a_file_is_created_opened_and_replaced_as_asked() {
    let (inside, directory, _outside) = place();
    let made = directory.create_directories("one/two", 0o700).unwrap();
    assert_eq!(made.path_of(""), inside.path().join("one/two/"));
    directory.create_directories("one/two", 0o700).expect("it is there");
    let mut file = directory.file("one/two/file", OFlags::RDWR | OFlags::CREATE | OFlags::APPEND, 0o640).unwrap();
    file.write_all(b"first").unwrap();
    let exclusive = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    assert!(directory.file("one/two/file", exclusive, 0o640).unwrap_err().to_string().contains("exists"));
    let mut again = made.file("file", OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND, 0o640).unwrap();
    again.write_all(b", second").unwrap();
    assert!(!rustix::fs::fcntl_getfl(&again).unwrap().contains(OFlags::NONBLOCK));
    assert_eq!(made.read("file", 100).unwrap(), b"first, second");
    let before = fs::metadata(inside.path().join("one/two/file")).unwrap().ino();
    directory.replace("one/two/file", b"third", 0o604).unwrap();
    let after = fs::metadata(inside.path().join("one/two/file")).unwrap();
    assert_ne!(after.ino(), before, "who has the old one open goes on reading it");
    assert_eq!(after.permissions().mode() & 0o7777, 0o604);
    made.file("file", OFlags::WRONLY | OFlags::TRUNC, 0).unwrap();
    assert_eq!(made.read("file", 0).unwrap(), b"");
    // A directory cannot be replaced by a file, and nothing is left of the attempt.
    directory.replace("one/two", b"x", 0o600).unwrap_err();
    assert_eq!(directory.names(10).unwrap(), ["one"]);
    assert!(made.remove_file("file").unwrap());
    assert_eq!((made.remove_file("file").unwrap(), made.stat("file").unwrap().is_none()), (false, true));
}

#[test]
fn a_directory_that_is_held_stays_the_same_whatever_gets_its_name() {
    let (inside, directory, outside) = place();
    fs::create_dir(inside.path().join("pod")).unwrap();
    let pod = directory.directory("pod").unwrap();
    fs::rename(inside.path().join("pod"), inside.path().join("moved")).unwrap();
    symlink(outside.path().join("a/b"), inside.path().join("pod")).unwrap();
    pod.replace("record", b"x", 0o600).unwrap();
    assert!(!pod.remove_file("secret").unwrap());
    assert!(inside.path().join("moved/record").exists());
    untouched(&outside);
}

#[test]
fn a_tree_goes_without_what_its_links_lead_to() {
    let (inside, directory, outside) = place();
    let tree = inside.path().join("tree");
    for name in ["a/b/c", "a/removed-0/d", "e", "removed-0/f"] {
        fs::create_dir_all(tree.join(name)).unwrap();
        fs::write(tree.join(name).join("file"), "").unwrap();
        symlink(outside.path(), tree.join(name).join("link")).unwrap();
        symlink(outside.path().join("a/b/secret"), tree.join(name).join("file-link")).unwrap();
    }
    let _listener = UnixListener::bind(tree.join("socket")).unwrap();
    fs::write(inside.path().join("neighbour"), "").unwrap();
    assert!(directory.remove_tree("tree").unwrap());
    assert!(!directory.remove_tree("tree").unwrap(), "nothing is there any more");
    assert_eq!(directory.names(10).unwrap(), ["neighbour"]);
    untouched(&outside);
    // A link in its place goes, and nothing else.
    symlink(outside.path(), &tree).unwrap();
    assert!(directory.remove_tree("tree").unwrap());
    assert!(directory.remove_tree("neighbour").unwrap());
    untouched(&outside);
}

#[test]
fn a_tree_of_any_depth_goes() {
    let (inside, directory, _outside) = place();
    // Deeper than a path, a stack or a process's descriptors reach.
    let mut here = directory.create_directories("deep", 0o755).unwrap();
    for _ in 0..1100 {
        fs::write(format!("/proc/self/fd/{}/file", here.as_fd().as_raw_fd()), "").unwrap();
        here = here.create_directories("down", 0o755).unwrap();
    }
    assert!(directory.remove_tree("deep").unwrap());
    assert_eq!(fs::read_dir(inside.path()).unwrap().count(), 0);
}

#[test]
fn what_is_mounted_in_a_tree_stays() {
    let (inside, directory, outside) = place();
    let (tree, source) = (inside.path().join("tree"), outside.path().to_owned());
    let path = directory.path_of("");
    let in_namespace = std::thread::spawn(move || {
        // SAFETY: a namespace of this thread's own, which shares its descriptors with the process as before.
        if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.is_err() {
            eprintln!("not tested: it takes root");
            return;
        }
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        for name in ["x/y/mounted", "x/y/z", "mounted"] {
            fs::create_dir_all(tree.join(name)).unwrap();
        }
        fs::write(tree.join("file"), "").unwrap();
        let bind = |name: &str| mount(&source, tree.join(name), "", MountFlags::BIND, None).unwrap();
        bind("mounted");
        bind("x/y/mounted");
        // Another one holds a mount of the process's other namespace.
        let directory = Directory::open(&path).unwrap();
        let error = directory.remove_tree("tree").unwrap_err().to_string();
        assert!(error.contains("something is mounted there"), "{error}");
        let error = directory.remove_tree("tree/mounted").unwrap_err().to_string();
        assert!(error.contains("something is mounted there"), "{error}");
        assert_eq!(fs::read(source.join("a/b/secret")).unwrap(), b"secret");
        assert!(!tree.join("file").exists() && !tree.join("x").exists(), "all else is gone");
    });
    in_namespace.join().unwrap();
    untouched(&outside);
    // In this namespace nothing is mounted there.
    directory.remove_tree("tree").unwrap();
}

#[tokio::test]
async fn a_socket_is_the_one_that_was_looked_up() {
    let (inside, directory, _outside) = place();
    // Longer than a socket's address can be.
    let long = "l".repeat(200);
    let below = directory.create_directories(&long, 0o755).unwrap();
    let bind = |to: &str| UnixListener::bind(format!("/proc/self/fd/{}/{to}", below.as_fd().as_raw_fd())).unwrap();
    let right = bind("socket");
    let socket = directory.socket(Path::new(&long).join("socket")).unwrap();
    let path = inside.path().join(&long).join("socket");
    fs::remove_file(&path).unwrap();
    let wrong = bind("socket");
    wrong.set_nonblocking(true).unwrap();
    let mut client = connect_to(&socket).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut client, b"x").await.unwrap();
    let mut byte = [0];
    right.accept().unwrap().0.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
    assert_eq!(wrong.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(right);
    assert_eq!(connect_to(&socket).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_listener_that_takes_nobody_is_not_waited_for() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let (inside, directory, _outside) = place();
    let path = inside.path().join("socket");
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let socket = directory.socket("socket").unwrap();
    let _first = connect_to(&socket).await.unwrap();
    assert_eq!(connect_to(&socket).await.unwrap_err().kind(), io::ErrorKind::WouldBlock);
}
