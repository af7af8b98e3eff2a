//! Logs: one line per event on standard output, where BOSH's and every other supervisor collects them.

use std::backtrace::Backtrace;
use std::fmt;
use std::io::{self, IsTerminal};
use std::panic;

use tracing::Dispatch;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::reload;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object per line, the event's fields beside `timestamp`, `level`, `message` and `target`.
    #[default]
    Json,
    /// For people at a terminal.
    Text,
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "log level `{level}`: {why}; give error, warn, info, debug or trace, or a list like `info,weft_node=debug`"
    )]
    Level { level: String, why: String },
    #[error("logging is set up already in this process")]
    SetUpBefore,
}

/// The level of the process's log, which can be changed while it runs.
pub struct Level {
    change: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Level")
    }
}

impl Level {
    /// From now on; a level or a list of `target=level`.
    pub fn set(&self, level: &str) -> Result<(), LogError> {
        (self.change)(filter(level)?)
            .map_err(|gone| LogError::Level { level: level.into(), why: gone.to_string() })
    }
}

/// Starts logging for the whole process, panics included. `level` is a level or a list of `target=level`.
pub fn init(level: &str, format: Format) -> Result<Level, LogError> {
    let (dispatch, level) = dispatch(level, format, io::stdout)?;
    tracing::dispatcher::set_global_default(dispatch).map_err(|_| LogError::SetUpBefore)?;
    log_panics();
    Ok(level)
}

/// Panics go to the log as errors, and to standard error as ever.
fn log_panics() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let location = panic.location().map(ToString::to_string);
        let why = panic.payload_as_str().unwrap_or("not a message");
        tracing::error!(why, location, backtrace = %Backtrace::capture(), "panic");
        before(panic);
    }));
}

/// Times are RFC 3339 in UTC, in microseconds: the subscriber's own clock.
fn dispatch<W>(level: &str, format: Format, writer: W) -> Result<(Dispatch, Level), LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let events = tracing_subscriber::fmt().with_env_filter(filter(level)?).with_writer(writer);
    Ok(match format {
        Format::Json => {
            let events = events.json().flatten_event(true).with_current_span(false).with_filter_reloading();
            let level = changed_by(events.reload_handle());
            (events.into(), level)
        }
        Format::Text => {
            let events = events.with_ansi(io::stdout().is_terminal()).with_filter_reloading();
            let level = changed_by(events.reload_handle());
            (events.into(), level)
        }
    })
}

fn changed_by<S: 'static>(handle: reload::Handle<EnvFilter, S>) -> Level {
    Level { change: Box::new(move |filter| handle.reload(filter)) }
}

fn filter(level: &str) -> Result<EnvFilter, LogError> {
    let refuse = |why: String| LogError::Level { level: level.to_owned(), why };
    // A lone word is a target to EnvFilter: a misspelt level would silence everything else.
    for word in level.split(',').filter(|word| !word.contains('=')) {
        // The empty word parses as a level, too.
        let known = !word.is_empty() && word.parse::<LevelFilter>().is_ok();
        if !known {
            return Err(refuse(format!("`{word}` is no level")));
        }
    }
    EnvFilter::try_new(level).map_err(|why| refuse(why.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, format: Format, act: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let (dispatch, _) = dispatch(level, format, move || writer.clone()).unwrap();
        tracing::dispatcher::with_default(&dispatch, act);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_carry_flat_fields_and_a_utc_time() {
        let text = logged("info", Format::Json, || {
            tracing::info!(subnet = "10.255.1.0/24", revision = 7, "lease held");
            tracing::debug!("not shown");
        });
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "lease held");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["subnet"], "10.255.1.0/24");
        assert_eq!(line["revision"], 7);
        let time = line["timestamp"].as_str().unwrap();
        assert_eq!(time.len(), "2026-01-01T00:00:00.000000Z".len(), "{time}");
        assert!(time.ends_with('Z'), "{time}");
    }

    #[test]
    fn text_lines_are_plain_when_not_at_a_terminal() {
        let text = logged("warn,weft_daemon=debug", Format::Text, || tracing::debug!(app = "a", "shown"));
        assert!(text.contains("DEBUG") && text.contains("shown"), "{text}");
    }

    #[test]
    fn the_level_changes_while_it_runs() {
        for format in [Format::Json, Format::Text] {
            let lines = Lines::default();
            let writer = lines.clone();
            let (dispatch, level) = dispatch("info", format, move || writer.clone()).unwrap();
            tracing::dispatcher::with_default(&dispatch, || {
                tracing::debug!("first");
                level.set("debug").unwrap();
                tracing::debug!("second");
                level.set("loud").unwrap_err();
                tracing::debug!("third");
                level.set("warn").unwrap();
                tracing::info!("fourth");
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            let shown = ["first", "second", "third", "fourth"].map(|word| text.contains(word));
            assert_eq!(shown, [false, true, true, false], "{text}");
        }
    }

    #[test]
    fn panics_are_logged_as_errors() {
        let text = logged("error", Format::Json, || {
            let before = panic::take_hook();
            panic::set_hook(Box::new(|_| ()));
            log_panics();
            let caught = panic::catch_unwind(|| panic!("the invariant broke"));
            panic::set_hook(before);
            assert!(caught.is_err());
        });
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert_eq!(line["why"], "the invariant broke");
        assert!(line["location"].as_str().unwrap().contains("log.rs"), "{line}");
    }

    #[test]
    fn a_misspelt_level_is_refused() {
        for level in ["inof", "", "info,loud", "weft_node=loud"] {
            let message = filter(level).unwrap_err().to_string();
            assert!(message.contains("log level"), "{message}");
        }
        filter("info,weft_node=trace").unwrap();
    }
}
