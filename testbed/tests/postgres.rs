//! The scratch server keeps what it committed over `kill -9`, and leaves no process.

use weft_testbed::postgres::{Postgres, USER};

#[test]
fn what_is_committed_survives_kill() {
    let postgres = Postgres::scratch().unwrap();
    let config = postgres.database("weft").unwrap();
    assert_eq!(config["name"], "weft");
    postgres
        .sql("weft", "create table held (subnet cidr); insert into held values ('10.255.1.0/24')")
        .unwrap();
    let server = postgres.daemon.process().unwrap();
    for _ in 0..3 {
        postgres.kill().unwrap();
        postgres.start().unwrap();
        assert_eq!(postgres.sql("weft", "select subnet from held").unwrap(), "10.255.1.0/24\n");
    }
    assert!(!server.alive());
    let refused = postgres.sql(USER, "select no_such_column").unwrap_err().to_string();
    assert!(refused.contains("no_such_column"), "{refused}");
    let server = postgres.daemon.process().unwrap();
    drop(postgres);
    assert!(!server.alive());
}
