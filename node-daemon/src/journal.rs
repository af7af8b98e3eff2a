//! The journal of containers: what survives the daemon, and not the machine.
//!
//! Owns one file of JSON lines: a header that names the boot, then the records of [`weft_model::cell::Record`] in
//! order. Written before the kernel hears of a change, without fsync: after a crash of the daemon the page cache is
//! still there, and after a crash of the machine its links are not. A torn last line is the record that nobody acted
//! on yet.
//!
//! What cannot be written (a full disk) leaves no half of itself, and all is written anew as soon as it can be. A container
//! that was deleted meanwhile is there again for a daemon that starts then, without its link: it goes with its namespace.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::debug;
use weft_model::cell::Record;

/// The file is written anew when it has grown by so many lines beyond what it would need.
const SLACK: usize = 4096;

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("create the state directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("read the journal {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("write the journal {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("journal {path}: line {line} cannot be read ({why}); move the file away to start without it")]
    Line { path: PathBuf, line: usize, why: String },
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    boot_id: String,
}

#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot_id: String,
    /// None after a failed write: something is missing in the file, so it is written anew before anything is added.
    file: Option<File>,
    /// Bytes of what has been written whole.
    length: u64,
    lines: usize,
}

impl Journal {
    /// Opens the journal in `directory` and gives what it holds of this boot; of another boot, nothing. That it cannot be
    /// written, the first [`Journal::append`] says: until there is something to add, nothing is lost.
    pub fn open(directory: &Path, boot_id: &str) -> Result<(Self, Vec<Record>), JournalError> {
        fs::create_dir_all(directory)
            .map_err(|source| JournalError::Directory { path: directory.to_owned(), source })?;
        let path = directory.join("containers.jsonl");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(absent) if absent.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(JournalError::Read { path, source }),
        };
        let records = records(&path, &text, boot_id)?;
        let mut journal = Self { path, boot_id: boot_id.to_owned(), file: None, length: 0, lines: 0 };
        if let Err(error) = journal.rewrite(&records) {
            debug!(%error, "started with a journal that cannot be written yet");
        }
        Ok((journal, records))
    }

    /// Adds records, and what is missing since a write failed. `all` gives the shortest journal of the whole roster, for when
    /// the file must be written anew.
    pub fn append(
        &mut self,
        records: &[Record],
        all: impl FnOnce() -> Vec<Record>,
    ) -> Result<(), JournalError> {
        if records.is_empty() && self.file.is_some() {
            return Ok(());
        }
        let Some(mut file) = self.file.take().filter(|_| self.lines < SLACK) else {
            return self.rewrite(&all());
        };
        let text = lines(records);
        if let Err(source) = file.write_all(text.as_bytes()) {
            // A daemon that starts now must not find what nobody acted on. Where not even this is possible, it does.
            let _cut = file.set_len(self.length);
            return Err(JournalError::Write { path: self.path.clone(), source });
        }
        self.file = Some(file);
        self.length += text.len() as u64;
        self.lines += records.len();
        Ok(())
    }

    fn rewrite(&mut self, records: &[Record]) -> Result<(), JournalError> {
        let failed = |source| JournalError::Write { path: self.path.clone(), source };
        let header = serde_json::to_string(&Header { boot_id: self.boot_id.clone() })
            .map_err(|why| failed(why.into()))?;
        let next = self.path.with_extension("jsonl.next");
        let text = format!("{header}\n{}", lines(records));
        let written = fs::write(&next, &text).and_then(|()| fs::rename(&next, &self.path));
        if let Err(source) = written {
            // Half of it would take the room that it lacks.
            let _removed = fs::remove_file(&next);
            return Err(failed(source));
        }
        let file = OpenOptions::new().append(true).open(&self.path).map_err(failed)?;
        self.file = Some(file);
        self.length = text.len() as u64;
        self.lines = 0;
        Ok(())
    }
}

fn lines(records: &[Record]) -> String {
    let mut text = String::new();
    for record in records {
        // Records hold texts and numbers only; there is nothing in them that JSON cannot say.
        text.push_str(&serde_json::to_string(record).unwrap_or_default());
        text.push('\n');
    }
    text
}

fn records(path: &Path, text: &str, boot_id: &str) -> Result<Vec<Record>, JournalError> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut lines = whole.lines().enumerate();
    let unreadable = |line: usize, why: serde_json::Error| JournalError::Line {
        path: path.to_owned(),
        line: line + 1,
        why: why.to_string(),
    };
    let Some((line, header)) = lines.next() else { return Ok(Vec::new()) };
    let header: Header = serde_json::from_str(header).map_err(|why| unreadable(line, why))?;
    if header.boot_id != boot_id {
        return Ok(Vec::new());
    }
    lines.map(|(line, text)| serde_json::from_str(text).map_err(|why| unreadable(line, why))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use weft_model::address::OverlayAddr;
    use weft_model::bandwidth::Bandwidth;
    use weft_model::cell::Roster;
    use weft_model::container::{Container, Owner};

    fn present(n: u8) -> Record {
        Record::Present(Arc::new(Container {
            handle: format!("container-{n}").parse().expect("handle"),
            addr: OverlayAddr::new([10, 255, 1, n].into()),
            interface: "eth0".parse().expect("name"),
            mtu: 1450,
            wanted_mtu: None,
            namespace: String::new(),
            owner: Owner { app_id: "app".into(), ..Owner::default() },
            ports: Vec::new(),
            network: "weft".into(),
            profile: None,
            passed: None,
            bandwidth: Bandwidth::default(),
        }))
    }

    fn file(directory: &Path) -> PathBuf {
        directory.join("containers.jsonl")
    }

    fn reopened(directory: &Path) -> Vec<Record> {
        Journal::open(directory, "boot").expect("open").1
    }

    #[test]
    fn what_was_added_is_read_back() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut journal, none) = Journal::open(directory.path(), "boot").expect("open");
        assert_eq!(none, []);
        let records = [
            present(2),
            present(3),
            Record::Leaving("container-2".parse().expect("handle")),
            Record::Resting(OverlayAddr::new([10, 255, 1, 2].into())),
        ];
        journal.append(&records[..1], Vec::new).expect("append");
        journal.append(&records[1..], Vec::new).expect("append");
        assert_eq!(reopened(directory.path()), records);
        assert_eq!(reopened(directory.path()), records, "opening rewrites the file with the same records");
    }

    #[test]
    fn another_boot_voids_it() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut journal, _) = Journal::open(directory.path(), "boot").expect("open");
        journal.append(&[present(2)], Vec::new).expect("append");
        assert_eq!(Journal::open(directory.path(), "another boot").expect("open").1, []);
        assert_eq!(reopened(directory.path()), [], "and for good");
    }

    #[test]
    fn a_torn_last_line_is_left_out_wherever_it_is_torn() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut journal, _) = Journal::open(directory.path(), "boot").expect("open");
        journal.append(&[present(2), present(3)], Vec::new).expect("append");
        let whole = fs::read(file(directory.path())).expect("read");
        let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').expect("lines") + 1;
        for end in last..whole.len() {
            fs::write(file(directory.path()), &whole[..end]).expect("write");
            assert_eq!(reopened(directory.path()), [present(2)], "torn at {end}");
        }
    }

    #[test]
    fn damage_in_the_middle_is_an_error_that_names_the_line() {
        let directory = tempfile::tempdir().expect("directory");
        fs::write(file(directory.path()), "{\"boot_id\":\"boot\"}\ngarbage\n{}\n").expect("write");
        let error = Journal::open(directory.path(), "boot").expect_err("damaged").to_string();
        assert!(error.contains("line 2") && error.contains("containers.jsonl"), "{error}");
    }

    #[test]
    fn a_long_journal_is_written_anew_and_means_the_same() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut journal, _) = Journal::open(directory.path(), "boot").expect("open");
        let mut roster = Roster::default();
        for round in 0..3000u32 {
            let n = u8::try_from(round % 200).expect("small") + 2;
            let addr = OverlayAddr::new([10, 255, 1, n].into());
            let records = [present(n), Record::Resting(addr), Record::Free(addr)];
            records.iter().for_each(|record| drop(roster.apply(record)));
            journal.append(&records, || roster.records().collect()).expect("append");
        }
        let text = fs::read_to_string(file(directory.path())).expect("read");
        assert!(text.lines().count() < SLACK + 500, "{} lines", text.lines().count());
        let mut replayed = Roster::default();
        reopened(directory.path()).iter().for_each(|record| drop(replayed.apply(record)));
        assert_eq!(replayed, roster);
    }

    #[test]
    fn a_write_that_failed_is_made_good_by_the_next() {
        let directory = tempfile::tempdir().expect("directory");
        let (mut journal, _) = Journal::open(directory.path(), "boot").expect("open");
        journal.file =
            Some(File::open(file(directory.path())).expect("a descriptor that cannot be written to"));
        journal.append(&[present(2)], Vec::new).expect_err("not writable");
        journal.append(&[present(3)], || vec![present(2), present(3)]).expect("append");
        assert_eq!(reopened(directory.path()), [present(2), present(3)]);
    }
}
