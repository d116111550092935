//! The text of one JSON line, without building the rest of it.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// The string at `field` of one line, unescaped into `scratch`; `Ok(None)` for a blank line, a null or "".
pub fn text<'a>(line: &[u8], field: &str, scratch: &'a mut Vec<u8>) -> Result<Option<&'a str>> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(None);
    }
    scratch.clear();
    scratch.reserve(line.len());
    let simple = !field.bytes().any(|byte| matches!(byte, b'"' | b'\\' | 0..0x20));
    if !simple || plain(line, field, scratch).is_none() {
        let Some(text) = parse(line, field)? else { return Ok(None) };
        scratch.clear();
        scratch.extend_from_slice(text.as_bytes());
    }
    let text = simdutf8::compat::from_utf8(scratch).map_err(|e| Error::data(format!("not UTF-8: {e}")))?;
    Ok((!text.is_empty()).then_some(text))
}

/// The common line, `{"field": "…"}` with nothing else in it; None where it is any other, or malformed.
fn plain(line: &[u8], field: &str, out: &mut Vec<u8>) -> Option<()> {
    let rest = literal(line, b"{")?;
    let rest = literal(rest, b"\"")?.strip_prefix(field.as_bytes())?.strip_prefix(b"\"")?;
    let mut rest = literal(literal(rest, b":")?, b"\"")?;
    loop {
        let at = copy_plain(rest, out)?;
        if rest[at] == b'"' {
            rest = &rest[at + 1..];
            break;
        }
        let escape = *rest.get(at + 1)?;
        rest = &rest[at + 2..];
        if escape == b'u' {
            let (character, after) = unicode(rest)?;
            out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            rest = after;
        } else {
            out.push(Some(SIMPLE[usize::from(escape)]).filter(|byte| *byte != 0)?);
        }
    }
    literal(rest, b"}")?.iter().all(u8::is_ascii_whitespace).then_some(())
}

/// What a character after a backslash stands for; 0 where that is no single byte.
const SIMPLE: [u8; 256] = {
    let mut table = [0; 256];
    let pairs = [
        (b'n', b'\n'),
        (b't', b'\t'),
        (b'r', b'\r'),
        (b'b', 8),
        (b'f', 12),
        (b'"', b'"'),
        (b'\\', b'\\'),
        (b'/', b'/'),
    ];
    let mut i = 0;
    while i < pairs.len() {
        table[pairs[i].0 as usize] = pairs[i].1;
        i += 1;
    }
    table
};

/// Appends the text before the first quote or difficult escape, and returns where that is; None where there is
/// none, or a control character before it.
fn copy_plain(bytes: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    let at = wide::copy_plain(bytes, out);
    let rest = &bytes[at..];
    let first = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))?;
    out.extend_from_slice(&rest[..first]);
    (rest[first] >= 0x20).then_some(at + first)
}

/// Sixteen bytes at a time, on machines that surely can.
#[cfg(target_arch = "x86_64")]
mod wide {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_loadu_si128, _mm_max_epu8, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
        _mm_storeu_si128,
    };

    const WIDTH: usize = 16;

    /// Appends text, simple escapes undone, up to a quote, another escape or a control character, and returns
    /// how many bytes that took; or what is left is shorter than a word.
    pub fn copy_plain(bytes: &[u8], out: &mut Vec<u8>) -> usize {
        out.reserve(bytes.len() + WIDTH);
        let (start, mut at, mut written) = (out.len(), 0, 0);
        // SAFETY: SSE2 is part of x86-64. Every load lies in `bytes`, every store in the capacity reserved above
        // (`written` is at most `at`, that is at most `bytes.len()`, and a word is written at once), and
        // `set_len` covers only bytes written.
        unsafe {
            let (quote, escape) = (_mm_set1_epi8(b'"'.cast_signed()), _mm_set1_epi8(b'\\'.cast_signed()));
            let control = _mm_set1_epi8(0x1f);
            let target = out.as_mut_ptr().add(start);
            while at + WIDTH <= bytes.len() {
                #[expect(clippy::cast_ptr_alignment, reason = "loadu takes any address")]
                let word = _mm_loadu_si128(bytes.as_ptr().add(at).cast::<__m128i>());
                let low = _mm_cmpeq_epi8(_mm_max_epu8(word, control), control); // byte <= 0x1f
                let special =
                    _mm_or_si128(low, _mm_or_si128(_mm_cmpeq_epi8(word, quote), _mm_cmpeq_epi8(word, escape)));
                #[expect(clippy::cast_ptr_alignment, reason = "storeu takes any address")]
                _mm_storeu_si128(target.add(written).cast::<__m128i>(), word);
                let found = _mm_movemask_epi8(special).cast_unsigned();
                if found == 0 {
                    (at, written) = (at + WIDTH, written + WIDTH);
                    continue;
                }
                let first = found.trailing_zeros() as usize;
                (at, written) = (at + first, written + first);
                let meant = bytes.get(at + 1).map_or(0, |byte| super::SIMPLE[usize::from(*byte)]);
                if bytes[at] != b'\\' || meant == 0 {
                    break;
                }
                target.add(written).write(meant);
                (at, written) = (at + 2, written + 1);
            }
            out.set_len(start + written);
        }
        at
    }
}

/// Elsewhere the caller's loop does it all.
#[cfg(not(target_arch = "x86_64"))]
mod wide {
    pub fn copy_plain(_bytes: &[u8], _out: &mut Vec<u8>) -> usize {
        0
    }
}

/// What follows blanks and a literal.
fn literal<'a>(bytes: &'a [u8], what: &[u8]) -> Option<&'a [u8]> {
    bytes.trim_ascii_start().strip_prefix(what)
}

/// The character of `\uXXXX`, or of a pair of surrogates, after the first `\u`.
fn unicode(bytes: &[u8]) -> Option<(char, &[u8])> {
    let hex = |digits: &[u8]| {
        let all = digits.iter().all(u8::is_ascii_hexdigit);
        all.then(|| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()).flatten()
    };
    let first = hex(bytes.get(..4)?)?;
    let rest = &bytes[4..];
    if let Some(character) = char::from_u32(first) {
        return Some((character, rest));
    }
    let second = hex(rest.strip_prefix(b"\\u")?.get(..4)?)?;
    let pair = (0xd800..0xdc00).contains(&first) && (0xdc00..0xe000).contains(&second);
    let code = 0x1_0000 + ((first & 0x3ff) << 10) + (second & 0x3ff);
    Some((char::from_u32(code).filter(|_| pair)?, &rest[6..]))
}

/// How deep objects and lists may lie in each other (as in `serde_json`): the parser calls itself for each, and a
/// stack that overflows ends the process.
const DEEPEST: usize = 128;

fn too_deep(line: &[u8]) -> bool {
    if memchr::memchr2_iter(b'{', b'[', line).nth(DEEPEST).is_none() {
        return false; // the common case, quickly
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    line.iter().any(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > DEEPEST
    })
}

/// Any object, by the book.
fn parse<'a>(line: &'a [u8], field: &str) -> Result<Option<Cow<'a, str>>> {
    let text = simdutf8::compat::from_utf8(line).map_err(|e| Error::data(format!("not UTF-8: {e}")))?;
    if too_deep(line) {
        return Err(Error::data(format!("malformed JSON: nested more than {DEEPEST} deep")));
    }
    let mut deserializer = sonic_rs::Deserializer::from_str(text);
    let found = Object { field }
        .deserialize(&mut deserializer)
        .and_then(|found| deserializer.end().map(|()| found))
        .map_err(|error| {
            let message = error.to_string();
            Error::data(format!("malformed JSON: {}", message.lines().next().unwrap_or("")))
        })?;
    found.ok_or_else(|| Error::data(format!("no key {field:?} in this object")))
}

struct Object<'f> {
    field: &'f str,
}

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Option<Option<Cow<'de, str>>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Option<Option<Cow<'de, str>>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with the key {:?}", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(Text(key)) = map.next_key()? {
            let key = key.ok_or_else(|| A::Error::custom("a key that is no string"))?;
            if key == self.field {
                found = Some(map.next_value::<Text>()?.0);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// A string, borrowed where it has no escapes; None for null.
struct Text<'a>(Option<Cow<'a, str>>);

impl<'de> serde::Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or null")
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> std::result::Result<Self::Value, E> {
        Ok(Text(Some(Cow::Borrowed(text))))
    }
    fn visit_str<E>(self, text: &str) -> std::result::Result<Self::Value, E> {
        Ok(Text(Some(Cow::Owned(text.to_owned()))))
    }
    fn visit_string<E>(self, text: String) -> std::result::Result<Self::Value, E> {
        Ok(Text(Some(Cow::Owned(text))))
    }
    fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
        Ok(Text(None))
    }
    fn visit_none<E>(self) -> std::result::Result<Self::Value, E> {
        Ok(Text(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(line: &[u8]) -> Result<Option<String>> {
        text(line, "text", &mut Vec::new()).map(|t| t.map(str::to_owned))
    }

    #[test]
    fn finds_the_text_among_other_keys() {
        let line = br#"{"id": [1, {"text": 3}], "text": "a\n\u00e9\ud83d\ude00", "x": null}"#;
        assert_eq!(one(line).unwrap().unwrap(), "a\n\u{e9}\u{1f600}");
        for blank in [&br#"{"text": null}"#[..], br#"{"text": ""}"#, b" \t\r\n"] {
            assert_eq!(one(blank).unwrap(), None);
        }
    }

    #[test]
    fn refuses_what_is_no_such_object() {
        let lines: [&[u8]; 12] = [
            br#"{"text": "a"#,
            br#"{"text": 3}"#,
            br#"{"other": "a"}"#,
            br#"["a"]"#,
            br#"{"text": "a"} x"#,
            b"{",
            br#"{"text": "\ud800"}"#,
            br#"{"text": "\ud800\u0041"}"#,
            br#"{"text": "\u+041"}"#,
            br#"{"text": "\x"}"#,
            b"{\"text\": \"\xff\"}",
            b"{\"text\": \"a\tb\"}",
        ];
        for line in lines {
            assert!(one(line).is_err(), "{}", String::from_utf8_lossy(line));
        }
    }

    proptest! {
        #[test]
        fn both_ways_agree_with_serde_json(content in any::<String>(), ascii: bool, other: bool) {
            let mut written = serde_json::to_string(&content).unwrap();
            if ascii {
                let units: Vec<u16> = written.encode_utf16().collect();
                let escaped = |unit: &u16| match u8::try_from(*unit) {
                    Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
                    _ => format!("\\u{unit:04x}"),
                };
                written = units.iter().map(escaped).collect();
            }
            let line = if other { format!("{{\"a\": 1, \"text\" :{written}}}") } else { format!(" {{ \"text\": {written} }}\r\n") };
            prop_assert_eq!(one(line.as_bytes()).unwrap().unwrap_or_default(), content);
        }

        #[test]
        fn bytes_that_are_anything_never_panic_and_what_is_taken_is_json(line in proptest::collection::vec(any::<u8>(), 0..64)) {
            let wrapped = [b"{\"text\": \"".as_slice(), &line, b"\"}"].concat();
            for line in [&line[..], &wrapped] {
                if let Ok(Some(text)) = one(line) {
                    let value: serde_json::Value = serde_json::from_slice(line).unwrap();
                    prop_assert_eq!(value["text"].as_str().unwrap(), text);
                }
            }
        }
    }
}
