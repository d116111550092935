//! What the loader costs beside its tokenizer: one pass over a corpus by the bare tokenizer on all threads (text
//! in memory), and by the loader, each in a process of its own.
//!
//!     throughput bare|load CORPUS TOKENIZER [THREADS] [none|block|global] [CACHE]

use std::time::{Duration, Instant};

use stackbench_loader::{Config, Engine, Loader, STAGES, Shuffle, Stage, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, corpus, tokenizer, rest @ ..] = args.as_slice() else {
        return Err("throughput bare|load CORPUS TOKENIZER [THREADS] [none|block|global] [CACHE]".into());
    };
    let threads: usize = rest.first().map_or(Ok(2), |text| text.parse())?;
    if what == "bare" {
        return bare(corpus, tokenizer, threads);
    }
    let mut config = Config::new(corpus.as_str(), tokenizer.as_str(), 8, 2048);
    config.threads = threads;
    config.shuffle = match rest.get(1).map(String::as_str) {
        Some("block") => Shuffle::Block,
        Some("global") => Shuffle::Global,
        _ => Shuffle::None,
    };
    config.cache = rest.get(2).map(Into::into);
    let begin = Instant::now();
    let loader = Loader::new(config)?;
    let opened = begin.elapsed();
    let (mut batches, mut sum, mut padding) = (0u64, 0i64, 0u64);
    let mut first = Duration::ZERO;
    while let Some(batch) = loader.take()? {
        if batches == 0 {
            first = begin.elapsed();
        }
        batches += 1;
        padding += batch.padding;
        sum += batch.tokens.as_slice().iter().map(|token| i64::from(*token)).sum::<i64>();
    }
    let total = begin.elapsed();
    let tokens = (batches * 8 * 2049) as f64;
    let stats = &loader.shared().common.stats;
    println!(
        "{batches} batches, sum {sum}, padding {:.3} %: open {:.1} ms, first batch {:.1} ms, after it {:.1} Mtok/s, in all {:.1} Mtok/s",
        100.0 * padding as f64 / tokens,
        opened.as_secs_f64() * 1e3,
        first.as_secs_f64() * 1e3,
        tokens / total.saturating_sub(first).as_secs_f64() / 1e6,
        tokens / total.as_secs_f64() / 1e6,
    );
    for (stage, name) in Stage::ALL.into_iter().zip(STAGES) {
        print!("{name} {:.3} s  ", stats.cpu_ns(stage) as f64 / 1e9);
    }
    print!("process {:.3} s  ", process_cpu_s());
    println!("{}", loader.tokenizer().map_or("", |t| t.engine()));
    Ok(())
}

fn bare(corpus: &str, path: &str, threads: usize) -> Result<(), Box<dyn std::error::Error>> {
    let mut names: Vec<_> =
        std::fs::read_dir(corpus)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    names.sort();
    let mut texts: Vec<String> = Vec::new();
    for name in names {
        for line in std::fs::read_to_string(name)?.lines() {
            let value: serde_json::Value = serde_json::from_str(line)?;
            texts.push(value["text"].as_str().unwrap_or_default().to_owned());
        }
    }
    let tokenizer = Tokenizer::open(path.as_ref(), None, Engine::Fast, &[], None)?;
    let before = process_cpu_s();
    let begin = Instant::now();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let chunk = texts.len().div_ceil(400);
    let total: usize = std::thread::scope(|scope| {
        let work = || {
            let mut count = 0;
            let mut out = Vec::new();
            loop {
                let at = next.fetch_add(chunk, std::sync::atomic::Ordering::Relaxed);
                if at >= texts.len() {
                    return count;
                }
                out.clear();
                for text in &texts[at..(at + chunk).min(texts.len())] {
                    tokenizer.encode(text, &mut out).expect("text");
                }
                count += out.len();
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    });
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = process_cpu_s() - before;
    println!(
        "bare tokenizer, {threads} threads: {total} tokens, {:.1} Mtok/s, process {cpu:.3} s",
        total as f64 / seconds / 1e6
    );
    Ok(())
}

/// CPU seconds of this process so far.
fn process_cpu_s() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
