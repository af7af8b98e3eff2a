//! The two rules of ours in iptables' filter table, and who refuses what containers send to the cell itself.
//!
//! Our own nf_tables program only marks those packets, because a refusal in a table of ours could not be overridden
//! by an operator's `iptables -I INPUT … -j ACCEPT`. A rule at the end of INPUT refuses what is marked; a rule at the
//! end of FORWARD accepts what our program allowed, so that a policy of DROP there does not undo it. Both are in the
//! backend that the cell uses already: a rule in the other one would not be overridden either. They are written by
//! iptables itself: as native expressions they would make iptables' nft backend unusable on the whole cell.
//!
//! Owns: these two rules. Woken by the kernel's notifications on the ruleset (nft backend), by the clock, and by
//! programs that end. Emits [`Guard`](weft_model::firewall::Guard): while the rule in INPUT is not known to be there our program has to refuse by
//! itself. Nothing is removed when the task ends.
//!
//! ```text
//!  machine   decides                     backend   which of the two
//!  program   executes iptables           rule      the rules, and what a notification means for them
//! ```

mod backend;
mod machine;
mod program;
mod rule;

use std::path::PathBuf;

use futures::future::{Either, pending};
use futures::stream::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

pub use backend::Wish;
pub use program::directories;
pub use rule::{Mark, Rule};
pub use weft_model::firewall::Guard;

use crate::kernel::ruleset_events::{self, Event as Notification};
use machine::{Act, Event, Job, Machine, Tale};
use rule::Touch;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    pub backend: Wish,
    /// Where programs are looked for, in order ([`directories`]).
    pub directories: Vec<PathBuf>,
}

/// How many notifications are taken in before anything is done about them: a transaction has many.
const AT_ONCE: usize = 256;

/// Runs until nobody is interested any more, in the network namespace of the threads that poll it. The first word is
/// published when the rule in INPUT was looked for, also if it is what the channel holds.
pub async fn run(config: Config, publish: watch::Sender<Guard>) {
    let mut machine = Machine::new(config.backend, Instant::now());
    let notifications = ruleset_events::watch();
    let mut events = vec![Event::Listening(notifications.is_ok())];
    let mut notifications = std::pin::pin!(match notifications {
        Ok(notifications) => notifications.ready_chunks(AT_ONCE).left_stream(),
        Err(error) => {
            warn!(error = %error.reason(), "changes of iptables' rules are not announced; they are looked for");
            futures::stream::pending().right_stream()
        }
    });
    let mut job = std::pin::pin!(Either::Left(pending()));
    loop {
        for event in events {
            for act in machine.on(event, Instant::now()) {
                match act {
                    Act::Publish(guard) => drop(publish.send_replace(guard)),
                    Act::Tell(tale) => tell(&tale),
                    Act::Run(next) => job.set(Either::Right(carry_out(next, &config.directories))),
                }
            }
        }
        let deadline = machine.next_deadline();
        events = tokio::select! {
            // What has been announced counts before the answer of a program that may have looked earlier.
            biased;
            () = publish.closed() => return,
            Some(notifications) = notifications.next() => touches(&notifications),
            event = &mut job => {
                job.set(Either::Left(pending()));
                vec![event]
            }
            () = until(deadline) => vec![Event::Clock],
        };
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

fn touches(notifications: &[Notification]) -> Vec<Event> {
    let touches = notifications.iter().flat_map(|notification| {
        Rule::ALL.map(|rule| Touch::of(notification, rule).map(|touch| Event::Touched(rule, touch)))
    });
    touches.flatten().collect()
}

async fn carry_out(job: Job, directories: &[PathBuf]) -> Event {
    match job {
        Job::Look => Event::Looked(program::look(directories).await),
        Job::Check(program, rule) => Event::Checked(rule, program::check(&program, rule).await),
        Job::Append(program, rule) => Event::Appended(rule, program::append(&program, rule).await),
        Job::Withdraw(program, rule) => Event::Withdrawn(rule, program::withdraw(&program, rule).await),
    }
}

fn tell(tale: &Tale) {
    match tale {
        Tale::Chosen(program, because) => {
            let path = program.path.display();
            info!(backend = %program.backend, program = %path, %because, "iptables backend chosen");
        }
        Tale::Appended(rule) => info!(chain = %rule, "iptables rule appended"),
        Tale::PutBack(rule) => warn!(chain = %rule, "drift repaired: somebody removed the iptables rule"),
        Tale::Withdrawn(rule) => {
            info!(chain = %rule, "iptables rule removed from the backend that is not used")
        }
        Tale::Mended(rule) => info!(chain = %rule, "iptables rule is there again"),
        Tale::Trouble(rule, trouble) => {
            let chain = rule.map_or("both", Rule::chain);
            error!(chain, error = %trouble.said, advice = trouble.why.advice(), "iptables rule not kept");
        }
    }
}
