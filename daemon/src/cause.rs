//! What an error's causes say, as one line.

use std::error::Error;
use std::iter::successors;

/// The error with all its causes.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    causes(error).collect::<Vec<_>>().join(": ")
}

/// The end of the chain: of a connection's errors it says what happened, and what is before it only where.
pub fn last(error: &(dyn Error + 'static)) -> String {
    causes(error).last().unwrap_or_default()
}

fn causes(error: &(dyn Error + 'static)) -> impl Iterator<Item = String> {
    successors(Some(error), |error| (*error).source()).map(ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Because(&'static str, #[source] Option<Box<Because>>);

    #[test]
    fn a_chain_is_said_from_what_was_tried_to_what_happened() {
        let why = |text, cause| Because(text, cause);
        let error = why("ask", Some(Box::new(why("connect", Some(Box::new(why("refused", None)))))));
        assert_eq!((chain(&error), last(&error)), ("ask: connect: refused".into(), "refused".into()));
        assert_eq!(last(&why("alone", None)), "alone");
    }
}
