//! Writes a corpus as pre-tokenized shards, in the order in which its documents lie.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::loader::{Config, Opened};
use crate::pipeline::{Claim, Cursor, Shared};
use crate::segment::Segment;
use crate::shards::{Header, Writer};

type Made = (u64, Result<Segment>);

/// Tokenizes all documents of the configuration's one source into `directory`, which must be new or empty.
/// `progress` is called with the tokens written so far; an error from it ends the work.
pub fn tokenize(config: &Config, directory: &Path, mut progress: impl FnMut(u64) -> Result<()>) -> Result<Header> {
    if config.sources.len() != 1 {
        return Err(Error::input("tokenize takes one source; write several directories and mix those"));
    }
    let opened = Opened::new(config)?;
    let Some(tokenizer) = opened.tokenizer.clone() else {
        return Err(Error::input("this corpus is tokenized already"));
    };
    let mut writer = Writer::create(directory, tokenizer.end, &tokenizer.hash)?;
    let shared = opened.shared(config, &[])?;
    let count = config.thread_count();
    let (work_in, work_out) = sync_channel::<(u64, Claim)>(2 * count);
    let (made_in, made_out) = sync_channel::<Made>(2 * count);
    let work_out = Arc::new(Mutex::new(work_out));
    std::thread::scope(|scope| {
        for _ in 0..count {
            let (shared, work, made) = (&shared, work_out.clone(), made_in.clone());
            scope.spawn(move || serve(shared, &work, &made));
        }
        drop((made_in, work_out));
        scope.spawn(|| claim_all(&shared, work_in));
        let done = write_in_order(&made_out, &mut writer, &mut progress);
        if done.is_err() {
            shared.common.stop.set();
        }
        drop(made_out);
        done
    })?;
    writer.finish()
}

fn claim_all(shared: &Shared, work: SyncSender<(u64, Claim)>) {
    let mut cursor = Cursor::new(0, 0, crate::pack::Position::default());
    for ordinal in 0.. {
        match cursor.next(shared) {
            Ok(Some(claim)) => {
                if work.send((ordinal, claim)).is_err() {
                    return; // nobody makes segments any more
                }
            }
            Ok(None) => return,
            Err(error) => {
                let _ = work.send((ordinal, Claim::failed(error)));
                return;
            }
        }
    }
}

fn serve(shared: &Shared, work: &Mutex<Receiver<(u64, Claim)>>, made: &SyncSender<Made>) {
    loop {
        let next = work.lock().expect("no thread panics here").recv();
        let Ok((ordinal, claim)) = next else { return };
        let segment = shared.make(0, claim).map(|(_, segment)| segment);
        if made.send((ordinal, segment)).is_err() {
            return;
        }
    }
}

fn write_in_order(
    made: &Receiver<Made>,
    writer: &mut Writer,
    progress: &mut impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let (mut waiting, mut next, mut written) = (BTreeMap::new(), 0, 0);
    for (ordinal, segment) in made {
        waiting.insert(ordinal, segment);
        while let Some(segment) = waiting.remove(&next) {
            let segment = segment?;
            writer.add(segment.tokens.as_slice(), &segment.ends)?;
            written += segment.tokens.as_slice().len() as u64;
            next += 1;
            progress(written)?;
        }
    }
    Ok(())
}
