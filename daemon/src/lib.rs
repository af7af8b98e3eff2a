//! What both daemons do at their edges: configuration file, logging, certificates, loopback HTTP.
#![forbid(unsafe_code)]
