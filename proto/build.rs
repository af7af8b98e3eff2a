//! Compiles the two protocols. protox parses them, so no protoc is needed where this is built.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["controller.proto", "node.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let parsed = protox::compile(files, ["."])?;
    tonic_prost_build::configure().compile_fds(parsed)?;
    Ok(())
}
