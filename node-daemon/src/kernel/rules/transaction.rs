//! The firewall's changes as one transaction, in the order that the kernel needs: what is referred to comes before what
//! refers to it, and goes after it.

use std::sync::Arc;

use nf_tables::batch::{Batch, Transaction};
use nf_tables::{Chain, Data, Name};
use weft_model::cell::{Belief, Change, Key, Object};
use weft_model::firewall::{Content, Filled, Part, refuses};

/// One change, with what it is about.
struct Item<'a> {
    key: &'a Key,
    part: &'a Part,
    was: Option<&'a Content>,
    will: Option<&'a Content>,
}

/// Whose it is, its map, its key and what it leads to.
type Element<'a> = (&'a Key, &'a Name, (&'a [u8], &'a Data));

/// `first`: the number of the first message. `anew`: the table is replaced.
pub(super) fn transaction<'a>(
    table: &Name,
    first: u32,
    anew: bool,
    changes: impl IntoIterator<Item = &'a Change>,
) -> Transaction<&'a Key> {
    let items: Vec<Item<'_>> = changes.into_iter().filter_map(item).collect();
    let mut batch = Batch::new(table, first);
    for Item { key, part, will, .. } in &items {
        if matches!((part, will), (Part::Table, Some(_))) {
            batch.add_table(key);
            if anew {
                // Deleted if it was there, and made again.
                batch.delete_table(key);
                batch.add_table(key);
            }
        }
    }
    for (key, name, set) in items.iter().filter_map(Item::new_set) {
        batch.add_set(&key, name, &set.set);
    }
    for (item, name, chain) in items.iter().filter_map(Item::laid_chain) {
        if item.was.is_none() {
            // Empty at first: chains lead to each other.
            batch.add_chain(&item.key, name, &Chain { base: chain.base, rules: Vec::new() });
        }
    }
    for (owner, name, (key, _)) in items.iter().filter_map(Item::old_element) {
        batch.delete_elements(&owner, name, [key]);
    }
    // The kernel shows packets sets of ranges one after the other, in this order, and a moment later than all else of the
    // transaction (nft_set_commit_update in nf_tables_api.c): with those first that refuse, nothing passes in between.
    let (refusing, allowing): (Vec<_>, Vec<_>) =
        items.iter().filter_map(Item::new_set).partition(|(_, name, _)| refuses(name));
    for (key, name, set) in refusing.into_iter().chain(allowing) {
        batch.add_ranges(&key, name, &set.ranges);
    }
    for (item, name, chain) in items.iter().filter_map(Item::laid_chain) {
        batch.replace_rules(&item.key, name, &chain.rules);
    }
    for (owner, name, new) in items.iter().filter_map(Item::new_element) {
        batch.add_elements(&owner, name, [new]);
    }
    let gone = |item: &&Item<'_>| item.was.is_some() && item.will.is_none();
    for Item { key, part, .. } in items.iter().filter(gone) {
        if let Part::Chain(name) = part {
            // Emptied at first, for the same reason.
            batch.replace_rules(key, name, &[]);
        }
    }
    // With them go the elements of others' maps, which may lead to chains.
    for Item { key, part, .. } in items.iter().filter(gone) {
        if let Part::Set(name) = part {
            batch.delete_set(key, name);
        }
    }
    for Item { key, part, .. } in items.iter().filter(gone) {
        if let Part::Chain(name) = part {
            batch.delete_chain(key, name);
        }
    }
    batch.finish()
}

fn item(change: &Change) -> Option<Item<'_>> {
    let part = change.key.part()?;
    let was = match &change.was {
        Some(Belief::Holds(object)) => object.content(),
        _ => None,
    };
    Some(Item { key: &change.key, part, was, will: change.will.as_ref().and_then(Object::content) })
}

impl<'a> Item<'a> {
    fn new_set(&self) -> Option<(&'a Key, &'a Name, &'a Arc<Filled>)> {
        match (self.part, self.was, self.will) {
            (Part::Set(name), None, Some(Content::Set(set))) => Some((self.key, name, set)),
            _ => None,
        }
    }

    fn laid_chain(&self) -> Option<(&Self, &'a Name, &'a Arc<Chain>)> {
        match (self.part, self.will) {
            (Part::Chain(name), Some(Content::Chain(chain))) => Some((self, name, chain)),
            _ => None,
        }
    }

    fn old_element(&self) -> Option<Element<'a>> {
        self.was.and_then(|was| self.element(was))
    }

    fn new_element(&self) -> Option<Element<'a>> {
        self.will.and_then(|will| self.element(will))
    }

    fn element(&self, content: &'a Content) -> Option<Element<'a>> {
        match (self.part, content) {
            (Part::Element(map, key), Content::Element(data)) => Some((self.key, map.name(), (&**key, data))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use weft_model::cell::Wanted;
    use weft_model::profile::Profile;
    use weft_model::walk;

    use super::*;

    /// dataplane.md, "Whose rules".
    #[test]
    fn sets_that_refuse_are_filled_before_those_that_allow() {
        let mut profile = Profile::clone(walk::wanted(1).profile.profile());
        profile.settings.deny_networks.always = vec!["198.51.100.0/24".parse().unwrap()];
        profile.settings.dns_servers = vec![[169, 254, 0, 2].into()];
        let mut cell = walk::start(7);
        cell.add(Wanted { profile: Arc::new(profile.into()), ..walk::wanted(1) }).unwrap();
        let step = cell.diff();
        let table = "weft".parse().unwrap();
        let transaction = transaction(&table, 1, true, &step.firewall.changes);
        // A set's first message makes it, its last one fills it.
        let mut filled = std::collections::BTreeMap::new();
        for sequence in transaction.first()..=transaction.last() {
            if let Some(Key::Firewall(Part::Set(name))) = transaction.owner(sequence) {
                filled.insert(name.clone(), sequence);
            }
        }
        let of = |refusing: bool| {
            let ranges =
                |name: &Name| ["deny-", "offered-", "asg-"].iter().any(|p| name.as_str().starts_with(p));
            let chosen = filled.iter().filter(move |(name, _)| ranges(name) && refuses(name) == refusing);
            chosen.map(|(_, sequence)| *sequence).collect::<Vec<_>>()
        };
        assert!(of(true).iter().max().unwrap() < of(false).iter().min().unwrap(), "{filled:?}");
    }
}
