use super::*;

use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

fn lines(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("line {n:050}\n")).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).expect("readable")
}

fn log() -> (TempDir, PathBuf, LogFile) {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("weft-node/traffic.log");
    let file = LogFile::new(path.clone());
    (directory, path, file)
}

/// Adds one line, which must succeed.
fn add(file: &mut LogFile, line: &str, now: Instant) {
    let appended = file.append(&[format!("{line}\n")], now);
    assert!(appended.whole == 1 && appended.turn.is_none(), "{appended:?}");
}

#[test]
fn lines_are_added_to_what_is_there() {
    let (_directory, path, mut file) = log();
    fs::create_dir_all(path.parent().expect("parent")).expect("made");
    fs::write(&path, "before\n").expect("written");
    add(&mut file, "after", Instant::now());
    assert_eq!(read(&path), "before\nafter\n");
}

#[test]
fn a_file_that_was_moved_or_removed_is_opened_anew() {
    let (_directory, path, mut file) = log();
    let start = Instant::now();
    add(&mut file, "1", start);
    let moved = path.with_extension("log.1");
    fs::rename(&path, &moved).expect("moved");
    add(&mut file, "2", start + LOOK / 2);
    assert_eq!(read(&moved), "1\n2\n", "it is not looked at with every line");
    add(&mut file, "3", start + LOOK);
    add(&mut file, "4", start + LOOK);
    assert_eq!((read(&moved), read(&path)), ("1\n2\n".into(), "3\n4\n".into()));

    fs::remove_file(&path).expect("removed");
    add(&mut file, "5", start + LOOK * 2);
    assert_eq!(read(&path), "5\n");

    // Another file in its place, as after an atomic replacement.
    fs::write(path.with_extension("new"), "").expect("written");
    fs::rename(path.with_extension("new"), &path).expect("moved");
    add(&mut file, "6", start + LOOK * 3);
    assert_eq!(read(&path), "6\n");

    // Emptied in place (copytruncate).
    OpenOptions::new().write(true).truncate(true).open(&path).expect("emptied");
    add(&mut file, "7", start + LOOK * 3);
    assert_eq!(read(&path), "7\n");
}

#[test]
fn an_outage_is_told_once_and_so_is_its_end() {
    let (_directory, path, mut file) = log();
    let now = Instant::now();
    // A directory is in the file's place.
    fs::create_dir_all(&path).expect("made");
    assert!(matches!(file.append(&lines(3), now), Appended { whole: 0, turn: Some(Turn::Fails(_)) }));
    for _ in 0..3 {
        assert!(matches!(file.append(&lines(3), now), Appended { whole: 0, turn: None }));
    }
    fs::remove_dir(&path).expect("removed");
    assert!(matches!(file.append(&lines(3), now), Appended { whole: 3, turn: Some(Turn::WorksAgain) }));
    assert!(matches!(file.append(&lines(3), now), Appended { whole: 3, turn: None }));
    assert_eq!(read(&path), lines(3).concat().repeat(2));
}

#[test]
fn a_device_that_is_full_takes_nothing() {
    let mut file = LogFile::new("/dev/full".into());
    let appended = file.append(&lines(2), Instant::now());
    assert_eq!(appended.whole, 0);
    let Some(Turn::Fails(why)) = appended.turn else { panic!("{appended:?}") };
    assert_eq!(why.kind(), ErrorKind::StorageFull);
}

/// The file is still open and in its place: it must be used again, and opened anew if it was rotated for want of room.
#[test]
fn a_full_disk_leaves_whole_lines_only() {
    let directory = tempfile::tempdir().expect("directory");
    let full = || {
        let root = directory.path();
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).expect("own mounts (as root?)");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
        mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("tmpfs");

        let (path, ballast) = (root.join("traffic.log"), root.join("ballast"));
        fs::write(&ballast, vec![0; 40 << 10]).expect("written");
        let (mut file, now) = (LogFile::new(path.clone()), Instant::now());
        let mut whole = 0;
        let batch = lines(100);
        let mut appended = file.append(&batch, now);
        while appended.turn.is_none() {
            assert_eq!(appended.whole, batch.len());
            whole += appended.whole;
            appended = file.append(&batch, now);
        }
        let Some(Turn::Fails(why)) = &appended.turn else { panic!("{appended:?}") };
        assert_eq!(why.kind(), ErrorKind::StorageFull);
        assert!(0 < appended.whole && appended.whole < batch.len(), "the disk was full within a batch");
        whole += appended.whole;
        let held = read(&path);
        assert_eq!(held.lines().count(), whole);
        assert!(held.lines().all(|line| line.len() == batch[0].len() - 1) && held.ends_with('\n'));

        assert!(matches!(file.append(&batch, now), Appended { turn: None, .. }), "still full, told before");
        fs::remove_file(&ballast).expect("removed");
        whole = read(&path).lines().count();
        assert!(matches!(file.append(&batch, now), Appended { whole: 100, turn: Some(Turn::WorksAgain) }));
        let held = read(&path);
        assert_eq!(held.lines().count(), whole + 100);
        assert!(held.lines().all(|line| line.len() == batch[0].len() - 1));

        // Full again, and the file rotated away to make room.
        fs::write(&ballast, vec![0; 40 << 10]).expect_err("full");
        while file.append(&batch, now).turn.is_none() {}
        fs::remove_file(&path).expect("removed");
        fs::remove_file(&ballast).expect("removed");
        assert!(matches!(file.append(&batch, now), Appended { whole: 100, turn: Some(Turn::WorksAgain) }));
        assert_eq!(read(&path), batch.concat());
    };
    thread::scope(|scope| scope.spawn(full).join()).unwrap_or_else(|e| std::panic::resume_unwind(e));
}
