//! Containers, brought into the network as Garden's CNI client (garden-external-networker) does it: the
//! namespace bound to a file within the cell, every plugin of the conflist with the same standard input and
//! environment, results cached for the deletion, which carries nothing of the container but its name. Calls, their order
//! and what they carry are libcni's.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Map, Value, json};

use crate::lab::Cell;
use crate::netns::{self, Place};
use crate::process::{self, Daemon};

/// The interface's name inside every container.
pub const INTERFACE: &str = "eth0";
/// Where a container's echo server listens.
pub const ECHO_PORT: u16 = 8080;
/// Where the distribution has other plugins.
const OTHER_PLUGINS: &str = "/usr/lib/cni";

/// A container that is in the network.
#[derive(Debug, Clone)]
pub struct Container {
    pub cell: String,
    pub handle: String,
    pub addr: Ipv4Addr,
    pub place: Place,
    /// The last plugin's result, as it came.
    pub result: Value,
}

/// What Garden tells its network plugin about a container, with names as Garden spells them.
#[derive(Debug, Clone)]
pub struct Request {
    pub handle: String,
    /// Properties of the container, their prefix `network.` removed: `app_id`, `space_id`, …
    pub properties: Map<String, Value>,
    /// `{"host_port", "container_port"}` each.
    pub port_mappings: Value,
    /// Security groups that Garden got with the container.
    pub net_out_rules: Value,
}

/// A network configuration list, as far as a CNI client reads it.
struct Conflist {
    network: String,
    version: Value,
    plugins: Vec<Map<String, Value>>,
}

impl Request {
    /// As Diego creates an app's container: identities made from the handle, no port mappings, no rules.
    pub fn app(handle: &str) -> Self {
        let properties = json!({
            "app_id": format!("app-of-{handle}"),
            "space_id": "space",
            "org_id": "org",
            "policy_group_id": format!("app-of-{handle}"),
            "ports": ECHO_PORT.to_string(),
            "container_workload": "app",
        });
        Self {
            handle: handle.to_owned(),
            properties: properties.as_object().cloned().unwrap_or_default(),
            port_mappings: Value::Null,
            net_out_rules: Value::Null,
        }
    }

    /// The keys that are added to every plugin's configuration. `metadata` stands beside `runtimeConfig`, not
    /// in it; values that Garden did not give are null.
    fn injected(&self) -> Map<String, Value> {
        let mut keys = Map::new();
        if !self.properties.is_empty() {
            keys.insert("metadata".to_owned(), Value::Object(self.properties.clone()));
        }
        let runtime = json!({"portMappings": self.port_mappings, "netOutRules": self.net_out_rules});
        keys.insert("runtimeConfig".to_owned(), runtime);
        keys
    }
}

impl Cell {
    /// Garden's `up`: makes the container's namespace and calls the plugins. What was made stays when a plugin
    /// fails, until [`Cell::del`]; so it is in Garden.
    pub fn add(&self, request: &Request) -> Result<Container> {
        let handle = &request.handle;
        self.create_namespace(handle)?;
        let list = self.read_conflist()?;
        let mut result = None;
        for plugin in &list.plugins {
            let config = list.config(plugin, request.injected(), result.take());
            let output = self.call(&self.environment("ADD", handle), &config)?;
            result = Some(answer("ADD", &output)?);
        }
        let result = result.context("the conflist names no plugin")?;
        let cached = json!({
            "kind": "cniCacheV1", "containerId": handle, "ifName": INTERFACE, "networkName": list.network,
            "result": result,
        });
        fs::write(self.cache(&list.network, handle), cached.to_string()).context("cache the result")?;
        Ok(Container {
            cell: self.name.clone(),
            handle: handle.clone(),
            addr: first_ipv4(&result)?,
            place: self.container_place(handle),
            result,
        })
    }

    /// Garden's `down`: ends what runs in the container, calls the plugins in reverse, drops the namespace.
    /// A container that is not there is no error.
    pub fn del(&self, handle: &str) -> Result<()> {
        process::end_all_in(&self.container_place(handle).ids(), Duration::ZERO)?;
        self.detach(&self.read_conflist()?, handle)?;
        let file = self.namespace_file(handle);
        self.place.enter(|| netns::remove_container(&file))?
    }

    /// Calls the plugins in reverse, with the last result of the ADD where the version has that.
    fn detach(&self, list: &Conflist, handle: &str) -> Result<()> {
        let cache = self.cache(&list.network, handle);
        let cached: Option<Value> = fs::read(&cache).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let cached = cached.filter(|_| list.has_since("0.4.0"));
        let previous = cached.and_then(|mut cached| cached.get_mut("result").map(Value::take));
        for plugin in list.plugins.iter().rev() {
            let config = list.config(plugin, Map::new(), previous.clone());
            let output = self.call(&self.environment("DEL", handle), &config)?;
            ensure!(output.status.success(), "DEL of {handle}: {}", said(&output));
        }
        drop(fs::remove_file(cache));
        Ok(())
    }

    /// Asks whether a container is still as it was made.
    pub fn check(&self, container: &Container) -> Result<()> {
        let list = self.read_conflist()?;
        ensure!(list.has_since("0.4.0"), "no CHECK in this version");
        for plugin in &list.plugins {
            let previous = Some(container.result.clone());
            let config = list.config(plugin, Map::new(), previous);
            let output = self.call(&self.environment("CHECK", &container.handle), &config)?;
            ensure!(output.status.success(), "CHECK of {}: {}", container.handle, said(&output));
        }
        Ok(())
    }

    /// A runtime's clean-up: deletes what it remembers and is not valid, then tells every plugin what is. Goes on
    /// after errors.
    pub fn collect(&self, valid: &[&str]) -> Result<()> {
        let list = self.read_conflist()?;
        let mut errors = Vec::new();
        for entry in fs::read_dir(self.directory.join("cni/results")).context("read the cache")? {
            let cached: Value =
                serde_json::from_slice(&fs::read(entry?.path())?).context("read the cache")?;
            let handle = cached["containerId"].as_str().unwrap_or_default();
            if cached["networkName"] == list.network.as_str() && !valid.contains(&handle) {
                errors.extend(self.detach(&list, handle).err());
            }
        }
        let attachments: Value =
            valid.iter().map(|handle| json!({"containerID": handle, "ifname": INTERFACE})).collect();
        let more =
            ["cni.dev/valid-attachments", "cni.dev/attachments"].map(|key| (key.into(), attachments.clone()));
        for plugin in list.plugins.iter().filter(|_| list.has_since("1.1.0")) {
            let config = list.config(plugin, more.clone().into_iter().collect(), None);
            let output = self.call(&self.bare_environment("GC"), &config)?;
            if !output.status.success() {
                errors.push(anyhow!("GC: {}", said(&output)));
            }
        }
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    /// Asks whether the network takes containers.
    pub fn takes_containers(&self) -> Result<()> {
        let list = self.read_conflist()?;
        for plugin in list.plugins.iter().filter(|_| list.has_since("1.1.0")) {
            let config = list.config(plugin, Map::new(), None);
            let output = self.call(&self.bare_environment("STATUS"), &config)?;
            ensure!(output.status.success(), "STATUS: {}", said(&output));
        }
        Ok(())
    }

    /// One call of the plugin within the cell.
    pub fn cni(&self, verb: &str, handle: &str, config: &Value) -> Result<Output> {
        let environment = self.environment(verb, handle);
        self.cni_raw(&environment, config.to_string().as_bytes())
    }

    /// One call of weft-cni within the cell, with any environment and any input.
    pub fn cni_raw(&self, environment: &[(&str, String)], input: &[u8]) -> Result<Output> {
        self.execute(&self.plugin_dir().join("weft-cni"), environment, input)
    }

    /// One call of the plugin that a configuration is for.
    fn call(&self, environment: &[(&str, String)], config: &Value) -> Result<Output> {
        let kind = config["type"].as_str().context("a plugin without a type")?;
        let places = [self.plugin_dir(), OTHER_PLUGINS.into()].map(|place| place.join(kind));
        let program = places.iter().find(|program| program.exists()).with_context(|| format!("no {kind}"))?;
        self.execute(program, environment, config.to_string().as_bytes())
    }

    fn execute(&self, program: &Path, environment: &[(&str, String)], input: &[u8]) -> Result<Output> {
        let mut command = Command::new(program);
        command.env_clear().envs(environment.iter().map(|(key, value)| (key, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.place.enter(|| {
            let mut child = command.spawn()?;
            // A plugin that ends without reading its input is answered by its exit status.
            drop(child.stdin.take().map(|mut stdin| stdin.write_all(input)));
            child.wait_with_output()
        })?;
        output.with_context(|| format!("execute {}", program.display()))
    }

    /// The environment that Garden's client gives a plugin.
    pub fn environment(&self, verb: &str, handle: &str) -> Vec<(&'static str, String)> {
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        vec![
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", handle.to_owned()),
            ("CNI_NETNS", path(self.namespace_file(handle))),
            ("CNI_ARGS", String::new()),
            ("CNI_IFNAME", INTERFACE.to_owned()),
            ("CNI_PATH", format!("{}:{OTHER_PLUGINS}", path(self.plugin_dir()))),
        ]
    }

    /// For calls that are about no container: all that is about one is empty.
    fn bare_environment(&self, verb: &str) -> Vec<(&'static str, String)> {
        let mut environment = self.environment(verb, "");
        for (name, value) in &mut environment {
            if matches!(*name, "CNI_CONTAINERID" | "CNI_NETNS" | "CNI_IFNAME") {
                value.clear();
            }
        }
        environment
    }

    /// A container's standard input for an ADD by the first plugin: for those who call it themselves.
    pub fn add_input(&self, request: &Request) -> Result<Value> {
        let list = self.read_conflist()?;
        let plugin = list.plugins.first().context("the conflist names no plugin")?;
        Ok(list.config(plugin, request.injected(), None))
    }

    /// The same for a DEL, without a cached result.
    pub fn del_input(&self) -> Result<Value> {
        let list = self.read_conflist()?;
        let plugin = list.plugins.first().context("the conflist names no plugin")?;
        Ok(list.config(plugin, Map::new(), None))
    }

    /// An empty network namespace for a container, kept within the cell.
    pub fn create_namespace(&self, handle: &str) -> Result<()> {
        let file = self.namespace_file(handle);
        self.place.enter(|| netns::create_container(&file))?
    }

    pub fn remove_namespace(&self, handle: &str) -> Result<()> {
        let file = self.namespace_file(handle);
        self.place.enter(|| netns::remove_container(&file))?
    }

    pub fn container_place(&self, handle: &str) -> Place {
        self.place.container(&self.namespace_file(handle))
    }

    /// Starts an echo server in a container, on [`ECHO_PORT`]; it ends with the container.
    pub fn serve(&self, container: &Container) -> Result<()> {
        let listener = container.place.enter(|| std::net::TcpListener::bind(("0.0.0.0", ECHO_PORT)))?;
        let listener = listener.context("listen in the container")?;
        let mut command = Command::new(self.programs.join("lab"));
        command.arg("echo");
        let daemon = Daemon::named(&self.directory.join("logs"), &format!("echo-{}", container.handle));
        // It listens already: whoever connects from now on is answered.
        let input = Stdio::from(std::os::fd::OwnedFd::from(listener));
        daemon.start(&container.place, command, Some(input)).map(drop)
    }

    pub fn plugin_dir(&self) -> PathBuf {
        self.directory.join("cni/plugins")
    }

    pub fn conflist(&self) -> PathBuf {
        self.directory.join("cni/config/30-weft.conflist")
    }

    /// Writes the conflist, with keys that replace or complete the plugin's own: containers that are added from now
    /// on come with them.
    pub fn configure_plugin(&self, keys: &Map<String, Value>) -> Result<()> {
        let mut plugin = self.plugin();
        plugin.extend(keys.clone());
        self.configure_list("1.0.0", "weft", &[plugin.into()])
    }

    /// What a conflist has to say of the plugin.
    pub fn plugin(&self) -> Map<String, Value> {
        let keys = [("type".to_owned(), json!("weft-cni")), ("socket".to_owned(), json!(self.socket))];
        keys.into_iter().collect()
    }

    /// Writes the conflist with these plugins.
    pub fn configure_list(&self, version: &str, network: &str, plugins: &[Value]) -> Result<()> {
        let conflist = json!({"cniVersion": version, "name": network, "plugins": plugins});
        fs::write(self.conflist(), format!("{conflist:#}\n")).context("write the conflist")
    }

    pub(crate) fn install_plugin(&self, keys: &Map<String, Value>) -> Result<()> {
        self.configure_plugin(keys)?;
        std::os::unix::fs::symlink(self.programs.join("weft-cni"), self.plugin_dir().join("weft-cni"))
            .context("install weft-cni")
    }

    /// The file that keeps a container's namespace: CNI_NETNS.
    pub fn namespace_file(&self, handle: &str) -> PathBuf {
        self.directory.join("containers").join(handle)
    }

    fn cache(&self, network: &str, handle: &str) -> PathBuf {
        self.directory.join("cni/results").join(format!("{network}-{handle}-{INTERFACE}"))
    }

    fn read_conflist(&self) -> Result<Conflist> {
        let text = fs::read(self.conflist()).context("read the conflist")?;
        let list: Value = serde_json::from_slice(&text).context("read the conflist")?;
        let plugins = list["plugins"].as_array().into_iter().flatten();
        let plugins = plugins.filter_map(|plugin| plugin.as_object().cloned()).collect();
        let network = list["name"].as_str().unwrap_or_default().to_owned();
        Ok(Conflist { network, version: list["cniVersion"].clone(), plugins })
    }
}

/// What the plugin says in its own words: the error's code and message, or its raw output.
pub fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout);
    let error: Option<Value> = serde_json::from_str(&text).ok();
    error.filter(|error| error["msg"].is_string()).map_or_else(
        || format!("{}: {}{}", output.status, text.trim(), String::from_utf8_lossy(&output.stderr).trim()),
        |error| {
            let details = error["details"].as_str().unwrap_or_default();
            format!("code {}: {} {details}", error["code"], error["msg"].as_str().unwrap_or_default())
        },
    )
}

fn answer(verb: &str, output: &Output) -> Result<Value> {
    ensure!(output.status.success(), "{verb}: {}", said(output));
    serde_json::from_slice(&output.stdout).with_context(|| format!("{verb}: read the plugin's result"))
}

impl Conflist {
    /// Whether its version is this one or a later one; each part of a version is one digit.
    fn has_since(&self, version: &str) -> bool {
        self.version.as_str().is_some_and(|own| own >= version)
    }

    fn config(
        &self,
        plugin: &Map<String, Value>,
        injected: Map<String, Value>,
        previous: Option<Value>,
    ) -> Value {
        let mut config = plugin.clone();
        config.insert("name".to_owned(), self.network.as_str().into());
        config.insert("cniVersion".to_owned(), self.version.clone());
        config.extend(injected);
        config.extend(previous.map(|previous| ("prevResult".to_owned(), previous)));
        Value::Object(config)
    }
}

fn first_ipv4(result: &Value) -> Result<Ipv4Addr> {
    let ips = result["ips"].as_array().into_iter().flatten().map(|entry| &entry["address"]);
    // In the first versions there was one.
    ips.chain([&result["ip4"]["ip"]])
        .filter_map(|address| address.as_str()?.split('/').next()?.parse().ok())
        .next()
        .with_context(|| format!("expected an IPv4 address in the CNI result, got {result}"))
}
