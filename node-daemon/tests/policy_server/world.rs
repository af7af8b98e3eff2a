//! A policy server on loopback with a certificate of its own authority. What it answers is a function of the path, or of method,
//! path and content where it is written to.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use weft_daemon::tls::Files;
use weft_node::policy_server::{Client, Server};

pub(crate) enum Reply {
    Text(u16, String),
    /// Half of what it says it has.
    Truncated(String),
    Garbage,
    /// Never.
    Silence,
}

pub(crate) fn ok(text: impl ToString) -> Reply {
    Reply::Text(200, text.to_string())
}

type Answers = Arc<Mutex<Box<dyn FnMut(&str) -> Reply + Send>>>;

pub(crate) struct World {
    pub(crate) directory: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) files: Files,
    answers: Answers,
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<usize>>,
    task: AbortHandle,
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    pub(crate) async fn start(answers: impl FnMut(&str) -> Reply + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let files = certificates(directory.path());
        let acceptor = TlsAcceptor::from(files.load(now()).unwrap().server_config().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answers: Answers = Arc::new(Mutex::new(Box::new(answers)));
        let (asked, connections) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<usize>>::default());
        let (a, b, c) = (Arc::clone(&answers), Arc::clone(&asked), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                *c.lock().unwrap() += 1;
                tokio::spawn(serve(acceptor.clone(), stream, Arc::clone(&a), Arc::clone(&b)));
            }
        });
        Self { directory, address, files, answers, asked, connections, task: task.abort_handle() }
    }

    pub(crate) fn answer(&self, answers: impl FnMut(&str) -> Reply + Send + 'static) {
        *self.answers.lock().unwrap() = Box::new(answers);
    }

    /// The paths asked for since the last time; and method and content of what is no GET.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    pub(crate) fn connections(&self) -> usize {
        *self.connections.lock().unwrap()
    }

    pub(crate) fn server(&self, certificates: &Files, answers_within: Duration) -> Server {
        let url = format!("https://localhost:{}", self.address.port()).parse().unwrap();
        Server { url, certificates: certificates.clone(), answers_within }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.server(&self.files, Duration::from_secs(60)))
    }
}

#[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// For both sides, of an authority made for them.
pub(crate) fn certificates(directory: &Path) -> Files {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.distinguished_name.push(DnType::CommonName, directory.display().to_string());
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = authority.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate().unwrap();
    let own =
        CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, &issuer).unwrap().pem();
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    Files {
        ca: file("ca.pem", &ca),
        certificate: file("own.pem", &own),
        key: file("own.key", &key.serialize_pem()),
    }
}

/// As Go's server does it: requests one after another on one connection, and all bodies said to be text.
async fn serve(acceptor: TlsAcceptor, stream: TcpStream, answers: Answers, asked: Arc<Mutex<Vec<String>>>) {
    // Clients without a certificate get no further.
    let Ok(mut tls) = acceptor.accept(stream).await else { return };
    loop {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            match tls.read_u8().await {
                Ok(byte) => request.push(byte),
                Err(_) => return,
            }
        }
        let request = String::from_utf8(request).unwrap();
        let mut words = request.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let length = request
            .to_lowercase()
            .split_once("content-length: ")
            .map_or(0, |(_, rest)| rest.split_once("\r\n").unwrap().0.parse().unwrap());
        let mut content = vec![0; length];
        tls.read_exact(&mut content).await.unwrap();
        let path = match method {
            "GET" => path.to_owned(),
            other => format!("{other} {path} {}", String::from_utf8(content).unwrap()),
        };
        asked.lock().unwrap().push(path.clone());
        let reply = (answers.lock().unwrap())(&path);
        let (head, body, goes_on) = match reply {
            Reply::Text(status, text) => (head(status, text.len()), text, true),
            Reply::Truncated(text) => (head(200, 2 * text.len()), text, false),
            Reply::Garbage => (String::new(), "\u{1}\u{2} no HTTP\r\n\r\n".into(), false),
            Reply::Silence => std::future::pending().await,
        };
        tls.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        tls.flush().await.unwrap();
        if !goes_on {
            tls.shutdown().await.unwrap();
            return;
        }
    }
}

fn head(status: u16, length: usize) -> String {
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\r\n"
    )
}
