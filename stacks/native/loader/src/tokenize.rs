//! Writes a corpus as pre-tokenized shards, in the order in which its documents lie.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::loader::{Config, Opened};
use crate::pack::Position;
use crate::pipeline::{Claim, Cursor, Shared};
use crate::segment::Segment;
use crate::shards::{Header, Writer};
use crate::stop::Stop;
use crate::sync::lock;

type Made = (u64, Result<Segment>);

/// How often `progress` is called, at the least.
const GLANCE: Duration = Duration::from_millis(50);

/// Tokenizes all documents of the configuration's one source into `directory`, which must be new or empty.
/// `progress` is called with the tokens written so far, and every 50 ms; an error from it ends the work. `stop`
/// ends the opening of the source. What was written before an error is removed.
pub fn tokenize(
    config: &Config,
    directory: &Path,
    stop: &Stop,
    mut progress: impl FnMut(u64) -> Result<()>,
) -> Result<Header> {
    if config.sources.len() != 1 {
        return Err(Error::input("tokenize takes one source; write several directories and mix those"));
    }
    let opened = Opened::new(config, stop)?;
    let Some(tokenizer) = opened.tokenizer.clone() else {
        return Err(Error::input("this corpus is tokenized already"));
    };
    let mut writer = Writer::create(directory, tokenizer.end, &tokenizer.hash)?;
    let shared = opened.shared(config, &[])?;
    let count = config.thread_count();
    let (work_in, work_out) = sync_channel::<(u64, Claim)>(2 * count);
    let (made_in, made_out) = sync_channel::<Made>(2 * count);
    let (permit, permits) = channel::<()>(); // so many segments at most are under way or wait for one before them
    for _ in 0..6 * count {
        let _ = permit.send(());
    }
    let work_out = Arc::new(Mutex::new(work_out));
    std::thread::scope(|scope| {
        for _ in 0..count {
            let (shared, work, made) = (&shared, work_out.clone(), made_in.clone());
            scope.spawn(move || serve(shared, &work, &made));
        }
        drop((made_in, work_out));
        let shared = &shared;
        scope.spawn(move || claim_all(shared, &work_in, &permits));
        let mut progress = |tokens| stop.check().and_then(|()| progress(tokens));
        let done = write_in_order(&made_out, &permit, &mut writer, &mut progress);
        if done.is_err() {
            shared.common.stop.set();
        }
        drop((made_out, permit));
        done
    })?;
    writer.finish()
}

fn claim_all(shared: &Shared, work: &SyncSender<(u64, Claim)>, permits: &Receiver<()>) {
    let mut cursor = Cursor::new(0, 0, Position::default());
    for ordinal in 0.. {
        if permits.recv().is_err() {
            return; // nothing is written any more
        }
        let claim = match cursor.next(shared) {
            Ok(Some(claim)) => claim,
            Ok(None) => return,
            Err(error) => {
                let _ = work.send((ordinal, Claim::failed(error)));
                return;
            }
        };
        if work.send((ordinal, claim)).is_err() {
            return; // nobody makes segments any more
        }
    }
}

fn serve(shared: &Shared, work: &Mutex<Receiver<(u64, Claim)>>, made: &SyncSender<Made>) {
    loop {
        let next = lock(work).recv();
        let Ok((ordinal, claim)) = next else { return };
        let (_, segment) = shared.make(0, claim);
        if made.send((ordinal, segment)).is_err() {
            return;
        }
    }
}

fn write_in_order(
    made: &Receiver<Made>,
    permit: &Sender<()>,
    writer: &mut Writer,
    progress: &mut impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let (mut waiting, mut next, mut written) = (BTreeMap::new(), 0, 0);
    loop {
        match made.recv_timeout(GLANCE) {
            Ok((ordinal, segment)) => {
                waiting.insert(ordinal, segment);
            }
            Err(RecvTimeoutError::Timeout) => progress(written)?,
            Err(RecvTimeoutError::Disconnected) if waiting.is_empty() => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => return Err(Error::new(Kind::Bug, "a segment was lost")),
        }
        while let Some(segment) = waiting.remove(&next) {
            let segment = segment?;
            writer.add(segment.tokens.as_slice(), &segment.ends)?;
            written += segment.tokens.as_slice().len() as u64;
            next += 1;
            let _ = permit.send(()); // it is no error where all has been claimed
            progress(written)?;
        }
    }
}
