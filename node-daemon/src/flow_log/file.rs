//! The file that lines are added to: opened anew when it was moved away or removed, and when it could not be written.
//!
//! It only ever ends in a whole line: what was written of one that did not fit is taken away again.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often it is looked whether the file is still there.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    open: Option<Open>,
    fails: bool,
}

#[derive(Debug)]
struct Open {
    file: File,
    identity: (u64, u64),
    /// When it was last seen in its place; none: look before the next line.
    seen: Option<Instant>,
    /// Bytes at its end that are no whole line.
    torn: u64,
}

#[derive(Debug)]
pub(super) struct Appended {
    /// So many of the lines are in the file, the first ones.
    pub(super) whole: usize,
    pub(super) turn: Option<Turn>,
}

/// Told once for each outage, and once for its end.
#[derive(Debug)]
pub(super) enum Turn {
    Fails(io::Error),
    WorksAgain,
}

impl LogFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, open: None, fails: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Each of the lines ends in a newline.
    pub(super) fn append(&mut self, lines: &[String], now: Instant) -> Appended {
        let (bytes, result) = match self.file(now) {
            Ok(open) => open.write(lines.concat().as_bytes()),
            Err(why) => (0, Err(why)),
        };
        let (mut whole, mut end) = (0, 0);
        for line in lines {
            if end + line.len() > bytes {
                break;
            }
            (whole, end) = (whole + 1, end + line.len());
        }
        if let (Some(open), Err(_)) = (&mut self.open, &result) {
            open.seen = None;
            open.torn += u64::try_from(bytes - end).unwrap_or_default();
            // If it cannot be mended now, nothing is added before it is.
            let _ = open.mend();
        }
        let failed = std::mem::replace(&mut self.fails, result.is_err());
        let turn = match result {
            Err(why) => (!failed).then_some(Turn::Fails(why)),
            Ok(()) => failed.then_some(Turn::WorksAgain),
        };
        Appended { whole, turn }
    }

    fn file(&mut self, now: Instant) -> io::Result<&mut Open> {
        if let Some(open) = &mut self.open {
            let seen = open.seen.is_some_and(|seen| now.saturating_duration_since(seen) < LOOK);
            if !seen {
                if fs::metadata(&self.path).is_ok_and(|there| identity(&there) == open.identity) {
                    open.seen = Some(now);
                } else {
                    self.open = None;
                }
            }
        }
        match &mut self.open {
            Some(open) => Ok(open),
            none => Ok(none.insert(Open::at(&self.path, now)?)),
        }
    }
}

impl Open {
    fn at(path: &Path, now: Instant) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let identity = identity(&file.metadata()?);
        Ok(Self { file, identity, seen: Some(now), torn: 0 })
    }

    /// How many bytes were written, and whether that is all.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        if let Err(why) = self.mend() {
            return (0, Err(why));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return (bytes.len() - rest.len(), Err(ErrorKind::WriteZero.into())),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(why) if why.kind() == ErrorKind::Interrupted => {}
                Err(why) => return (bytes.len() - rest.len(), Err(why)),
            }
        }
        (bytes.len(), Ok(()))
    }

    /// Takes half a line away, unless somebody emptied the file meanwhile.
    fn mend(&mut self) -> io::Result<()> {
        if self.torn > 0 {
            let length = self.file.metadata()?.len();
            self.file.set_len(length.checked_sub(self.torn).unwrap_or(length))?;
            self.torn = 0;
        }
        Ok(())
    }
}

fn identity(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

#[cfg(test)]
mod tests;
