-- The lease table and its head row: the same columns as on Postgres. SQLite knows neither addresses nor exclusion
-- constraints, so addresses are numbers, and triggers keep the promise.

create table lease (
    underlay     integer not null primary key,
    -- first and last address of the subnet
    subnet_first integer not null,
    subnet_last  integer not null,
    mac          text,
    cell_id      text    not null,
    boot_id      text    not null,
    state        text    not null check (state in ('held', 'expired', 'released')),
    state_since  integer not null,
    seen_at      integer not null,
    revision     integer not null
) strict;

create index lease_revision on lease (revision);
create index lease_subnet on lease (subnet_first, subnet_last);

create trigger lease_no_overlap_insert before insert on lease
when new.state <> 'released' and exists (
    select 1 from lease
    where underlay <> new.underlay and state <> 'released'
      and subnet_first <= new.subnet_last and new.subnet_first <= subnet_last
)
begin
    select raise(abort, 'lease_no_overlap');
end;

create trigger lease_no_overlap_update before update on lease
when new.state <> 'released' and exists (
    select 1 from lease
    where underlay <> new.underlay and state <> 'released'
      and subnet_first <= new.subnet_last and new.subnet_first <= subnet_last
)
begin
    select raise(abort, 'lease_no_overlap');
end;

create table head (
    only_row          integer not null primary key check (only_row = 1),
    epoch             integer not null,
    revision          integer not null,
    floor             integer not null,
    service_time      integer not null,
    ticked_at         integer not null,
    reconciling_until integer not null
) strict;
