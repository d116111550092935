//! Text to ids with the exact semantics of Hugging Face `tokenizers`: `fastokens` where it gives the same
//! ids on a sample, `tokenizers` itself elsewhere. Text never becomes a special token
//! (`encode_special_tokens = true`), and none is added.

use std::path::Path;
use std::sync::Once;

use fastokens::AddedTokenPolicy;

use crate::error::{Error, Result};

/// Which implementation tokenizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The fast one where it agrees with the reference on a sample, else the reference with a warning.
    Auto,
    /// The fast one; an error where it cannot read this tokenizer, and no comparison.
    Fast,
    /// Hugging Face `tokenizers`.
    Hf,
}

/// A tokenizer that threads share.
pub struct Tokenizer {
    inner: Inner,
    /// Id of end-of-text.
    pub end: u32,
    /// blake3 of the tokenizer.json.
    pub hash: String,
    /// Why the fast implementation is not used although it was asked for; empty if it is.
    pub warning: String,
}

enum Inner {
    Fast(Box<Fast>),
    Hf(Box<tokenizers::Tokenizer>),
}

/// Names of end-of-text, in the order in which they are looked for.
pub const END_OF_TEXT: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"];

/// Scripts, white space, numbers and code that tokenizers are known to disagree about.
const SAMPLE: &str = include_str!("sample.txt");

impl Tokenizer {
    /// Reads a tokenizer.json. `end` names the end-of-text token, None: the first of `END_OF_TEXT` there is.
    /// `sample` is text of the corpus, compared beside our own where the engine is `Auto`; `cache` keeps that
    /// a tokenizer was found to agree.
    pub fn open(path: &Path, end: Option<&str>, engine: Engine, sample: &[&str], cache: Option<&Path>) -> Result<Self> {
        let place = path.to_string_lossy().into_owned();
        let bytes = std::fs::read(path).map_err(|e| Error::from(e).in_file(&place))?;
        Self::from_bytes(&bytes, end, engine, sample, cache).map_err(|e| e.in_file(&place))
    }

    /// The same, from the content of a tokenizer.json.
    pub fn from_bytes(
        bytes: &[u8],
        end: Option<&str>,
        engine: Engine,
        sample: &[&str],
        cache: Option<&Path>,
    ) -> Result<Self> {
        let hash = blake3::hash(bytes).to_hex().to_string();
        let mut warning = String::new();
        let fast = match engine {
            Engine::Hf => None,
            _ => match open_fast(bytes) {
                Ok(fast) => Some(fast),
                Err(why) if engine == Engine::Fast => return Err(why),
                Err(why) => {
                    warning = format!("the fast tokenizer cannot read it ({why}): tokenizers is used");
                    None
                }
            },
        };
        let inner = match fast {
            Some(fast) if engine == Engine::Fast => Inner::Fast(fast),
            Some(fast) => {
                let key = blake3::hash(format!("{hash} {FAST_VERSION} {}", sample.concat()).as_bytes()).to_hex();
                let kept = cache.map(|dir| dir.join(format!("agrees-{}", &key[..24])));
                if kept.as_ref().is_some_and(|path| path.exists()) {
                    Inner::Fast(fast)
                } else if let Some(difference) = compare(&fast, &*open_hf(bytes)?, sample)? {
                    warning = format!("the fast tokenizer differs ({difference}): tokenizers is used");
                    Inner::Hf(open_hf(bytes)?)
                } else {
                    if let Some(path) = kept {
                        crate::source::write_atomic(&path, b"")?;
                    }
                    Inner::Fast(fast)
                }
            }
            None => Inner::Hf(open_hf(bytes)?),
        };
        let mut tokenizer = Self { inner, end: 0, hash, warning };
        tokenizer.end = tokenizer.find_end(end)?;
        Ok(tokenizer)
    }

    fn find_end(&self, name: Option<&str>) -> Result<u32> {
        let names: Vec<&str> = name.map_or(END_OF_TEXT.to_vec(), |name| vec![name]);
        let id = |token: &str| match &self.inner {
            Inner::Fast(fast) => fast.tokenizer.token_to_id(token),
            Inner::Hf(hf) => hf.token_to_id(token),
        };
        names.iter().find_map(|token| id(token)).ok_or_else(|| {
            Error::input(format!("no end-of-text token in the tokenizer; looked for {}", names.join(", ")))
        })
    }

    /// `fastokens 0.3.5` or `tokenizers 0.23`.
    pub fn engine(&self) -> &'static str {
        match &self.inner {
            Inner::Fast(_) => FAST_VERSION,
            Inner::Hf(_) => "tokenizers 0.23",
        }
    }

    /// Appends the ids of one document.
    pub fn encode(&self, text: &str, out: &mut Vec<i32>) -> Result<()> {
        match &self.inner {
            Inner::Fast(fast) => {
                let ids = fast.encode(text)?;
                // SAFETY: u32 and i32 have the same size and alignment, and every bit pattern is both.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(ids.as_ptr().cast::<i32>(), ids.len()) });
            }
            Inner::Hf(hf) => {
                let encoding = hf.encode_fast(text, false).map_err(|e| Error::data(format!("cannot tokenize: {e}")))?;
                out.extend(encoding.get_ids().iter().map(|id| id.cast_signed()));
            }
        }
        Ok(())
    }
}

const FAST_VERSION: &str = "fastokens 0.3.5";

/// fastokens, and which added tokens it looks for in text.
struct Fast {
    tokenizer: fastokens::Tokenizer,
    policy: AddedTokenPolicy,
}

impl Fast {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer
            .encode_unpadded(text, false, self.policy)
            .map_err(|e| Error::data(format!("cannot tokenize: {e}")))
    }
}

/// fastokens spreads documents of some size over a pool of its own. Our threads are busy with other documents
/// then, so that a pool only adds waiting and a cold cache: here it is left out of this process's copy of the
/// crate. It decides once, by the CPUs of the thread that asks first; this one has one CPU.
fn one_thread_a_document() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let ask = || {
            // SAFETY: a set of all zeroes is valid, and both calls get its size and look at no other thread.
            unsafe {
                let mut cpus: libc::cpu_set_t = std::mem::zeroed();
                let cpu = libc::sched_getcpu();
                if cpu >= 0 && (cpu as usize) < libc::CPU_SETSIZE as usize {
                    libc::CPU_SET(cpu as usize, &mut cpus);
                    libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cpus);
                }
            }
            fastokens::fanout::threads()
        };
        let _ = std::thread::spawn(ask).join();
    });
}

fn open_fast(bytes: &[u8]) -> Result<Box<Fast>> {
    let mut json: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| Error::input(format!("not a tokenizer.json: {e}")))?;
    for key in ["truncation", "padding"] {
        json[key] = serde_json::Value::Null; // a document is never cut or filled up
    }
    one_thread_a_document();
    let tokenizer = fastokens::Tokenizer::from_json(json).map_err(|e| Error::input(e.to_string()))?;
    // Where all added tokens are special none can be found in text, and the search for them is saved.
    let all = tokenizer.added_token_configs().iter().all(|added| added.special);
    let policy = if all { AddedTokenPolicy::None } else { AddedTokenPolicy::SkipSpecial };
    Ok(Box::new(Fast { tokenizer, policy }))
}

fn open_hf(bytes: &[u8]) -> Result<Box<tokenizers::Tokenizer>> {
    let mut hf =
        tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::input(format!("not a tokenizer.json: {e}")))?;
    hf.with_truncation(None).map_err(|e| Error::input(e.to_string()))?;
    hf.with_padding(None);
    hf.set_encode_special_tokens(true);
    Ok(Box::new(hf))
}

/// The first place where the two give other ids.
fn compare(fast: &Fast, hf: &tokenizers::Tokenizer, sample: &[&str]) -> Result<Option<String>> {
    for text in SAMPLE.split("\n----\n").chain(sample.iter().copied()) {
        let ours = fast.encode(text)?;
        let theirs = hf.encode_fast(text, false).map_err(|e| Error::input(e.to_string()))?;
        let theirs = theirs.get_ids();
        if ours != theirs {
            let at = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
            return Ok(Some(format!(
                "token {at} of {:?}…: {:?}, not {:?}",
                text.chars().take(24).collect::<String>(),
                ours.get(at),
                theirs.get(at)
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #[test]
    fn fastokens_starts_no_threads_of_its_own() {
        super::one_thread_a_document();
        assert_eq!(fastokens::fanout::threads(), 1, "fastokens decides about its pool in another way now");
    }
}
