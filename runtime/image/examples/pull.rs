//! Pulls an image and says where its disk is: `cargo run --example pull -- DIRECTORY REFERENCE`.

use std::path::Path;
use std::time::Instant;

use nacelle_image::ImageStore;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, reference] = &arguments[..] else { return Err("usage: pull DIRECTORY REFERENCE".into()) };
    let store = ImageStore::open(Path::new(directory))?;
    let begin = Instant::now();
    let image = store.pull(reference, None, |_| {}).await?;
    println!("{} {} bytes, {:?}", image.id, image.size, begin.elapsed());
    for file in image.rootfs_files() {
        println!("{} {}", file.metadata()?.len(), file.display());
    }
    Ok(())
}
