//! The profiles that containers were added with, found by what was passed.
//!
//! Owns the memory of them. Woken by the API, for each ADD. Emits shared profiles, and a warning for each security
//! group rule that a new list has and that cannot be what was meant.
//!
//! Most containers of a cell come with one of few lists, of up to a thousand rules each. A list that is known costs its
//! digest (128 bits of SHA-256), which the plugin may have taken, and a look into a map. The list itself is not kept: 50 of
//! a thousand rules are 5 MB of JSON.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::spawn_blocking;
use tracing::warn;
use weft_model::asg::Skipped;
use weft_model::asg::garden::{self, Rules};
use weft_model::container::Handle;
use weft_model::profile::{Digest, Known, Profile, Settings, Workload, digest_of};
use weft_model::reason::Reason;

/// Beyond either of these, those that nobody uses are forgotten: about as many as a cell has containers.
const MOST_ENTRIES: usize = 256;
const MOST_RULES: usize = 200_000;
/// A list that is longer is worked out aside, where it delays no other call: it takes more than a millisecond.
const LONG: usize = 32 << 10;
/// Rules that are reported one by one.
const REPORTED: usize = 20;

/// What a profile follows from.
#[derive(Debug, Clone)]
pub struct Passed {
    pub workload: Workload,
    pub settings: Settings,
    /// As they came: JSON.
    pub net_out_rules: Vec<u8>,
}

impl Passed {
    fn digest(&self) -> Digest {
        digest_with(self.workload, &self.settings, Digest::of_bytes(&self.net_out_rules))
    }
}

/// Of what was passed, with the digest of the rules.
fn digest_with(workload: Workload, settings: &Settings, rules: Digest) -> Digest {
    digest_of(&(workload, settings, rules))
}

/// Profiles by what they follow from.
#[derive(Debug, Default)]
pub struct Profiles {
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// By the digest of what was passed.
    known: HashMap<Digest, Arc<Known>>,
    /// Of all lists together.
    rules: usize,
}

impl Profiles {
    /// The profile that follows; the same each time, as long as somebody uses it. `handle` is whom it is for.
    pub async fn get(&self, passed: Passed, handle: &Handle) -> Result<Arc<Known>, Reason> {
        let digest = passed.digest();
        if let Some(known) = self.memory().known.get(&digest) {
            return Ok(Arc::clone(known));
        }
        let (known, skipped) = if passed.net_out_rules.len() > LONG {
            let worked_out = spawn_blocking(|| work_out(passed)).await;
            worked_out.map_err(|why| Reason::Bug { invariant: format!("rules are worked out: {why}") })??
        } else {
            work_out(passed)?
        };
        let (known, new) = self.memory().keep(digest, known);
        if new {
            report(handle, &skipped);
        }
        Ok(known)
    }

    /// The profile that follows from rules of that digest, if it is known.
    pub fn known(&self, workload: Workload, settings: &Settings, rules: Digest) -> Option<Arc<Known>> {
        self.memory().known.get(&digest_with(workload, settings, rules)).cloned()
    }

    /// Each change is whole, so what another has left is good whatever became of it.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    /// What another call has worked out meanwhile counts. Says whether this one is new.
    fn keep(&mut self, passed: Digest, known: Known) -> (Arc<Known>, bool) {
        let rules = known.profile().rules.len();
        let known = match self.known.entry(passed) {
            Entry::Occupied(there) => return (Arc::clone(there.get()), false),
            Entry::Vacant(place) => Arc::clone(place.insert(Arc::new(known))),
        };
        self.rules += rules;
        if self.known.len() > MOST_ENTRIES || self.rules > MOST_RULES {
            self.forget_unused();
        }
        (known, true)
    }

    fn forget_unused(&mut self) {
        self.known.retain(|_, known| Arc::strong_count(known) > 1);
        self.rules = self.known.values().map(|known| known.profile().rules.len()).sum();
    }
}

fn work_out(passed: Passed) -> Result<(Known, Vec<Skipped>), Reason> {
    let Rules { rules, skipped } = garden::parse(&passed.net_out_rules)?;
    let profile = Profile { workload: passed.workload, settings: passed.settings, rules };
    let known = Known::from(profile);
    // Worked out here: the cell's task would, when it plans.
    known.layers();
    Ok((known, skipped))
}

fn report(handle: &Handle, skipped: &[Skipped]) {
    for Skipped { index, why } in skipped.iter().take(REPORTED) {
        warn!(%handle, rule = index, reason = %why, "security group rule skipped");
    }
    if let Some(more) = skipped.len().checked_sub(REPORTED).filter(|more| *more > 0) {
        warn!(%handle, rules = more, "more security group rules skipped");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};

    use tracing::subscriber::DefaultGuard;
    use tracing_subscriber::fmt::MakeWriter;
    use weft_model::asg::EgressRule;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Log {
        /// What this thread logs, as long as the guard is there.
        fn take() -> (Self, DefaultGuard) {
            let log = Self::default();
            let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone()).finish();
            (log, tracing::subscriber::set_default(subscriber))
        }

        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Log {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    fn passed(rules: impl AsRef<[u8]>) -> Passed {
        let net_out_rules = rules.as_ref().to_vec();
        Passed { workload: Workload::Running, settings: Settings::default(), net_out_rules }
    }

    fn handle() -> Handle {
        "h-1".parse().unwrap()
    }

    /// A list that differs from those of other numbers.
    fn list(n: usize) -> String {
        let addr = std::net::Ipv4Addr::from(u32::try_from(n).unwrap());
        format!(r#"[{{"networks":[{{"start":"{addr}"}}]}}]"#)
    }

    fn rule(n: usize) -> EgressRule {
        garden::parse(list(n).as_bytes()).unwrap().rules[0]
    }

    #[tokio::test]
    async fn what_was_passed_before_is_the_same_profile() {
        let profiles = Profiles::default();
        let get = async |passed| profiles.get(passed, &handle()).await.unwrap();
        let first = get(passed(list(1))).await;
        assert_eq!(first.profile().rules.len(), 1);
        assert!(Arc::ptr_eq(&first, &get(passed(list(1))).await));

        let staging = Passed { workload: Workload::Staging, ..passed(list(1)) };
        let settings = Settings { log_all: true, ..Settings::default() };
        let logged = Passed { settings: settings.clone(), ..passed(list(1)) };
        assert_eq!(get(staging).await.profile().workload, Workload::Staging);
        assert_eq!(get(logged).await.profile().settings, settings);
        assert_ne!(get(passed(list(2))).await.digest(), first.digest());
        assert_eq!(get(passed("")).await.profile().rules, []);
    }

    #[tokio::test]
    async fn what_is_known_is_not_looked_into_again() {
        let profiles = Profiles::default();
        // No list that could be worked out.
        let (kept, _) = profiles.memory().keep(passed("known").digest(), Known::default());
        assert!(Arc::ptr_eq(&kept, &profiles.get(passed("known"), &handle()).await.unwrap()));
        profiles.get(passed("unknown"), &handle()).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_long_list_is_worked_out_as_well() {
        let profiles = Profiles::default();
        let rules: Vec<String> = (0..1000).map(|n| list(n)[1..].trim_end_matches(']').to_owned()).collect();
        let long = format!("[{}]", rules.join(","));
        assert!(long.len() > LONG);
        let known = profiles.get(passed(&long), &handle()).await.unwrap();
        assert_eq!(known.profile().rules.len(), 1000);
        assert!(Arc::ptr_eq(&known, &profiles.get(passed(&long), &handle()).await.unwrap()));
        let wrong = profiles.get(passed(" ".repeat(LONG + 1)), &handle()).await.unwrap_err();
        assert!(matches!(wrong, Reason::InvalidField { field, .. } if field == garden::FIELD));
    }

    #[tokio::test]
    async fn a_skipped_rule_is_reported_once_with_its_reason() {
        let (log, _guard) = Log::take();
        let profiles = Profiles::default();
        let bad = r#"[{"networks":[{"start":"1.1.1.1"}]},{"protocol":1,"networks":[{"start":"1.1.1.1"}]}]"#;
        for _ in 0..3 {
            let known = profiles.get(passed(bad), &handle()).await.unwrap();
            assert_eq!(known.profile().rules.len(), 1);
        }
        let lines = log.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        for part in ["WARN", "h-1", "rule=1", "it is for tcp, and names no ports"] {
            assert!(lines[0].contains(part), "{part}: {}", lines[0]);
        }
    }

    #[tokio::test]
    async fn of_many_skipped_rules_some_are_reported_and_the_others_counted() {
        let (log, _guard) = Log::take();
        let profiles = Profiles::default();
        profiles.get(passed(format!("[{}7]", "7,".repeat(REPORTED + 4))), &handle()).await.unwrap();
        let lines = log.lines();
        assert_eq!(lines.len(), REPORTED + 1);
        assert!(lines[REPORTED].contains("rules=5"), "{lines:?}");
        profiles.get(passed(format!("[{}7]", "7,".repeat(REPORTED - 1))), &handle()).await.unwrap();
        assert_eq!(log.lines().len(), 2 * REPORTED + 1, "nothing is left to count");
    }

    #[tokio::test]
    async fn what_nobody_uses_is_forgotten_once_there_is_much() {
        let profiles = Profiles::default();
        let used = profiles.get(passed(list(0)), &handle()).await.unwrap();
        for n in 1..MOST_ENTRIES {
            profiles.get(passed(list(n)), &handle()).await.unwrap();
        }
        assert_eq!(profiles.memory().known.len(), MOST_ENTRIES);
        let last = profiles.get(passed(list(MOST_ENTRIES)), &handle()).await.unwrap();
        {
            let memory = profiles.memory();
            assert_eq!((memory.known.len(), memory.rules), (2, 2));
        }
        for (n, held) in [(0, &used), (MOST_ENTRIES, &last)] {
            assert!(Arc::ptr_eq(held, &profiles.get(passed(list(n)), &handle()).await.unwrap()));
        }
        // Few, but large.
        let large = |n: usize| Known::from(Profile { rules: vec![rule(n); 20_000], ..Profile::default() });
        for n in 0..15 {
            profiles.memory().keep(digest_of(&n), large(n));
            assert!(profiles.memory().rules <= MOST_RULES);
        }
        assert!(profiles.memory().known.len() < 12);
    }
}
