//! How much a container may send and receive: silk's `rate` and `burst`, the same both ways (silk-release, job silk-cni),
//! or what the runtime asks for by CNI's conventions (capability `bandwidth`), which comes first.

use weft_model::bandwidth::{Bandwidth, Limit};
use weft_model::reason::Reason;

use super::fields::{Fields, invalid};

/// silk's kilobit.
const KILOBIT: u64 = 1024;

pub(super) fn bandwidth(conf: &Fields<'_>, runtime: Option<&Fields<'_>>) -> Result<Bandwidth, Reason> {
    if let Some(asked) = runtime.map(|runtime| runtime.object("bandwidth")).transpose()?.flatten() {
        // The conventions speak as the container does: what comes in to it, what goes out.
        let to = limit(&asked, ["ingressRate", "ingressBurst"], 1)?;
        let from = limit(&asked, ["egressRate", "egressBurst"], 1)?;
        return Ok(Bandwidth { to, from });
    }
    let both = limit(conf, ["rate", "burst"], KILOBIT)?;
    Ok(Bandwidth { to: both, from: both })
}

/// Both or neither; numbers of `unit` bits.
fn limit(of: &Fields<'_>, names: [&str; 2], unit: u64) -> Result<Option<Limit>, Reason> {
    let [rate, burst] = names;
    let (per_second, at_once) = (of.number(rate)?, of.number(burst)?);
    match (per_second, at_once) {
        (0, 0) => return Ok(None),
        (0, _) => return Err(invalid(of.name(rate), format!("must be set as well as {burst}"))),
        (_, 0) => return Err(invalid(of.name(burst), format!("must be set as well as {rate}"))),
        _ => {}
    }
    let bytes = |number: u64| number.checked_mul(unit).map(|bits| bits.div_ceil(8));
    let limit = bytes(per_second)
        .zip(bytes(at_once))
        .and_then(|(per_second, at_once)| Limit::new(per_second, u32::try_from(at_once).ok()?).ok());
    let too_much = || {
        invalid(
            of.name(rate),
            format!("{per_second} with {burst} {at_once} is more than the kernel can limit"),
        )
    };
    limit.map(Some).ok_or_else(too_much)
}
