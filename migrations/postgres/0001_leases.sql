-- The lease table and its head row. Weft's controllers are the only writers; design in docs/adr/0001.

-- One row per underlay address: who holds which subnet of the overlay.
create table lease (
    underlay    inet   not null,
    subnet      cidr   not null,
    -- the VTEP's MAC where it is not derived from the subnet
    mac         text,
    -- the machine that speaks for the address, and one boot of it
    cell_id     text   not null,
    boot_id     text   not null,
    state       text   not null,
    -- service time in seconds
    state_since bigint not null,
    seen_at     bigint not null,
    -- of the row's last published change
    revision    bigint not null,

    constraint lease_underlay primary key (underlay),
    constraint lease_state check (state in ('held', 'expired', 'released')),
    -- the promise of the whole table: what is in use never overlaps. Released rows are memory only.
    constraint lease_no_overlap exclude using gist (subnet inet_ops with &&) where (state <> 'released')
);

-- "what changed since" is the one question that is asked all the time
create index lease_revision on lease (revision);

-- One row: where the history stands. Its lock orders all writers.
create table head (
    only_row          boolean not null default true,
    -- random, new at creation and at restore
    epoch             bigint  not null,
    revision          bigint  not null,
    -- changes are complete from here on
    floor             bigint  not null,
    -- seconds that controllers have been running
    service_time      bigint  not null,
    -- seconds of the database's clock at the last tick
    ticked_at         bigint  not null,
    -- service time until which no new subnet is given out
    reconciling_until bigint  not null,

    constraint head_only_row primary key (only_row),
    constraint head_one_row check (only_row)
);
