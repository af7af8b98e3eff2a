//! How many decisions have no line of their own: the kernel counts them all, and logs only some.
//!
//! A total is read some time before or after the lines that it counts are written. What a reading finds is therefore
//! reported with the reading after it, when those lines have long been written: no decision is told twice, and once
//! nothing more happens lines and reports add up to the total.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::Decision;

/// What is counted by itself: the decisions of one kind for the container with this address.
pub type Decided = (Ipv4Addr, Decision);

/// As the kernel counts them, each since its counter was made.
pub type Totals = BTreeMap<Decided, u64>;

/// So many decisions more of which nothing else tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suppressed {
    pub container: Ipv4Addr,
    pub decision: Decision,
    pub count: u64,
}

#[derive(Debug, Clone, Default)]
pub struct Suppression {
    counts: BTreeMap<Decided, Count>,
    begun: bool,
}

/// All but `last` go on counting when the kernel's counter is made anew.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    /// What counters that are gone had reached, and reports that were not written.
    before: u64,
    /// The counter, when it was last read.
    last: u64,
    /// All that was counted at the last reading.
    total: u64,
    /// What lines and reports have told of.
    told: u64,
    /// Readings in succession without a counter.
    absent: u8,
}

impl Suppression {
    /// So many lines were written.
    pub fn printed(&mut self, decided: Decided, lines: u64) {
        self.counts.entry(decided).or_default().told += lines;
    }

    /// A report could not be written: its count is part of a later one.
    pub fn untold(&mut self, suppressed: &Suppressed) {
        // Not taken from what was told: the count may have been forgotten meanwhile.
        let count = self.counts.entry((suppressed.container, suppressed.decision)).or_default();
        count.before += suppressed.count;
        count.total += suppressed.count;
    }

    /// Counters as they are now, and what there is to report. Whatever was counted before the first reading is not
    /// ours to tell. A counter that is lower than before, or absent, was made anew, and began at 0: what it had counted
    /// since it was last read is not known. So counters are read right before and right after they are made anew.
    pub fn read(&mut self, totals: &Totals) -> Vec<Suppressed> {
        if !self.begun {
            self.begun = true;
            let count = |&last| Count { last, total: last, told: last, ..Count::default() };
            self.counts = totals.iter().map(|(decided, total)| (*decided, count(total))).collect();
            return Vec::new();
        }
        for decided in totals.keys() {
            self.counts.entry(*decided).or_default();
        }
        let mut suppressed = Vec::new();
        self.counts.retain(|decided @ &(container, decision), count| {
            let now = totals.get(decided);
            match count.total.saturating_sub(count.told) {
                0 => {}
                untold => {
                    suppressed.push(Suppressed { container, decision, count: untold });
                    count.told += untold;
                }
            }
            count.read(now.copied().unwrap_or_default());
            count.absent = if now.is_some() { 0 } else { count.absent + 1 };
            count.absent < 2
        });
        suppressed
    }
}

impl Count {
    fn read(&mut self, now: u64) {
        if now < self.last {
            self.before += self.last;
        }
        self.last = now;
        self.total = self.before + now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DENIED: Decided = (Ipv4Addr::new(10, 255, 30, 2), Decision::Denied);
    const OTHER: Decided = (Ipv4Addr::new(10, 255, 30, 3), Decision::Denied);

    fn counts(suppressed: &[Suppressed]) -> Vec<u64> {
        suppressed.iter().map(|suppressed| suppressed.count).collect()
    }

    fn begun() -> Suppression {
        let mut suppression = Suppression::default();
        assert_eq!(suppression.read(&Totals::new()), []);
        suppression
    }

    #[test]
    fn what_was_counted_before_the_first_reading_is_not_told() {
        let mut suppression = Suppression::default();
        suppression.printed(DENIED, 3);
        assert_eq!(suppression.read(&Totals::from([(DENIED, 500)])), []);
        assert_eq!(suppression.read(&Totals::from([(DENIED, 510)])), []);
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 510)]))), [10]);
    }

    #[test]
    fn a_line_on_its_way_is_not_told_twice() {
        let mut suppression = begun();
        assert_eq!(suppression.read(&Totals::from([(DENIED, 1)])), []);
        suppression.printed(DENIED, 1);
        assert_eq!(suppression.read(&Totals::from([(DENIED, 1)])), []);
        assert_eq!(suppression.read(&Totals::from([(DENIED, 1)])), []);
    }

    #[test]
    fn a_report_that_was_not_written_is_told_later() {
        let mut suppression = begun();
        suppression.read(&Totals::from([(DENIED, 9)]));
        let report = suppression.read(&Totals::from([(DENIED, 11)]));
        assert_eq!(report, [Suppressed { container: DENIED.0, decision: DENIED.1, count: 9 }]);
        suppression.untold(&report[0]);
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 11)]))), [11]);
        // Not even if the container is gone meanwhile.
        suppression.read(&Totals::new());
        suppression.read(&Totals::new());
        suppression.untold(&report[0]);
        assert_eq!(counts(&suppression.read(&Totals::new())), [9]);
    }

    #[test]
    fn a_counter_made_anew_counts_on() {
        let mut suppression = begun();
        suppression.read(&Totals::from([(DENIED, 7), (OTHER, 5)]));
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 2), (OTHER, 5)]))), [7, 5]);
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 3)]))), [2]);
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 3), (OTHER, 4)]))), [1]);
        assert_eq!(counts(&suppression.read(&Totals::from([(DENIED, 3), (OTHER, 4)]))), [4]);
    }

    #[test]
    fn what_the_kernel_does_not_count_is_forgotten() {
        let mut suppression = begun();
        suppression.printed(OTHER, 4);
        suppression.read(&Totals::from([(DENIED, 1)]));
        suppression.read(&Totals::from([(DENIED, 1)]));
        assert_eq!(suppression.counts.keys().collect::<Vec<_>>(), [&DENIED]);
    }

    #[derive(Debug, Clone)]
    enum Event {
        /// The kernel decides, and may log: then a line is on its way.
        Decided(Decided, bool),
        Reading,
        /// A reading; the counter starts again at 0; a reading.
        MadeAnew(Decided),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let decided = prop_oneof![Just(DENIED), Just(OTHER)];
        let event = prop_oneof![
            6 => (decided.clone(), any::<bool>()).prop_map(|(decided, logged)| Event::Decided(decided, logged)),
            2 => Just(Event::Reading),
            1 => decided.prop_map(Event::MadeAnew),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest! {
        /// Lines are written before the reading after the one that counts them: then at no time is more told than was
        /// decided, and in the end exactly that.
        #[test]
        fn lines_and_reports_add_up(events in events()) {
            let mut suppression = begun();
            let (mut totals, mut told, mut decided) = (Totals::new(), Totals::new(), Totals::new());
            let mut on_their_way: Vec<Decided> = Vec::new();
            let readings = std::iter::repeat_n(Event::Reading, 2);
            for event in events.into_iter().chain(readings) {
                match event {
                    Event::Decided(what, logged) => {
                        *totals.entry(what).or_default() += 1;
                        *decided.entry(what).or_default() += 1;
                        on_their_way.extend(logged.then_some(what));
                    }
                    Event::Reading | Event::MadeAnew(_) => {
                        for report in suppression.read(&totals) {
                            *told.entry((report.container, report.decision)).or_default() += report.count;
                        }
                        for line in on_their_way.drain(..) {
                            suppression.printed(line, 1);
                            *told.entry(line).or_default() += 1;
                        }
                        if let Event::MadeAnew(what) = event && totals.contains_key(&what) {
                            totals.insert(what, 0);
                            for report in suppression.read(&totals) {
                                *told.entry((report.container, report.decision)).or_default() += report.count;
                            }
                        }
                    }
                }
                for (what, count) in &told {
                    prop_assert!(*count <= decided[what], "{what:?}: {count} told of {}", decided[what]);
                }
            }
            prop_assert_eq!(told, decided);
        }
    }
}
