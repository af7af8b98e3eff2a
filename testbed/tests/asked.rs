//! What a conflist and Garden ask for, from the plugin's standard input to the node's answer and its log.

use std::fs;

use serde_json::json;
use weft_testbed::external_networker::Request;
use weft_testbed::{Lab, Options};

#[test]
fn what_is_asked_for_counts_or_is_refused_or_is_logged() {
    let mut options = Options::unique("asked").unwrap();
    options.cells = 1;
    options.plugin = json!({"dns_servers": ["169.254.0.2"]}).as_object().cloned().unwrap();
    let lab = Lab::up(&options).unwrap();
    let cell = &lab.cells[0];
    let asks = |handle: &str| Request {
        port_mappings: json!([{"host_port": 61000, "container_port": 8080}]),
        net_out_rules: json!([{"networks": [{"start": "1.1.1.1"}]}, {"protocol": 1, "networks": [{"start": "1.1.1.1"}]}]),
        ..Request::app(handle)
    };

    let first = cell.add(&asks("first")).unwrap();
    assert_eq!(first.result["dns"], json!({"nameservers": ["169.254.0.2"]}));
    let taken = cell.add(&asks("second")).unwrap_err().to_string();
    assert!(taken.contains("code 101") && taken.contains("61000") && taken.contains("first"), "{taken}");
    cell.del("second").unwrap();
    cell.del("first").unwrap();
    cell.add(&asks("second")).unwrap();

    // The same list came three times; it is complained of once.
    let directory = cell.directory.join("logs");
    let logs = fs::read_dir(directory).unwrap().map(|log| fs::read_to_string(log.unwrap().path()).unwrap());
    let complaints: Vec<String> = logs
        .flat_map(|log| log.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| line.contains("rule skipped"))
        .collect();
    assert_eq!(complaints.len(), 1, "{complaints:?}");
    assert!(complaints[0].contains("first") && complaints[0].contains("names no ports"), "{complaints:?}");

    cell.configure_plugin(json!({"dns_servers": ["banana"]}).as_object().unwrap()).unwrap();
    let wrong = cell.add(&Request::app("third")).unwrap_err().to_string();
    assert!(wrong.contains("code 7") && wrong.contains("banana"), "{wrong}");
    cell.del("third").unwrap();
    cell.del("second").unwrap();
}
