//! Reads Rust source just well enough to measure it: code apart from comments and literals, tokens,
//! functions, the test module at the end, and the modules that a file declares.
//!
//! A full parser would cost a minute of build time and hides comments, which half of the checks are
//! about. A lexer that knows strings, characters, lifetimes and nested comments is enough, because
//! what it feeds has already been compiled.
//!
//! Invariant: `code` and `comments` are as long as the source, byte for byte, and keep its line
//! ends; so an offset means the same place in all three.
//!
//! Absent on purpose: expansion of macros. What a macro writes is not measured.

/// A source file, split by a lexer.
pub struct RustSource<'a> {
    /// The file as it is.
    pub text: &'a str,
    /// Only code: comments and literals are spaces.
    pub code: String,
    /// Only comments: everything else is spaces.
    pub comments: String,
    line_starts: Vec<usize>,
}

/// A word (identifier or number) or one character of punctuation, with its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// Offset of the first byte.
    pub at: usize,
    /// The word or the character.
    pub text: &'a str,
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line of `fn`, counted from 1.
    pub first_line: usize,
    /// The line of the closing brace.
    pub last_line: usize,
}

/// A `mod` declaration.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Names of the inline modules around it, outermost first.
    pub within: Vec<String>,
    /// Its name.
    pub name: String,
    /// The value of `#[path = "…"]`.
    pub path: Option<String>,
    /// Whether its body stands in this file.
    pub inline: bool,
    /// The line of `mod`, counted from 1.
    pub line: usize,
}

impl<'a> RustSource<'a> {
    /// Splits `text`.
    pub fn new(text: &'a str) -> Self {
        let (code, comments) = split(text);
        let line_starts = std::iter::once(0)
            .chain(
                text.bytes()
                    .enumerate()
                    .filter(|(_, byte)| *byte == b'\n')
                    .map(|(at, _)| at + 1),
            )
            .collect();
        Self {
            text,
            code,
            comments,
            line_starts,
        }
    }

    /// The line of an offset, counted from 1.
    pub fn line_of(&self, at: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= at)
    }

    /// The tokens of the code.
    pub fn tokens(&self) -> Vec<Token<'_>> {
        tokens(&self.code)
    }

    /// Number of lines before the `#[cfg(test)]` module that ends the file, or of the whole file.
    pub fn lines_without_tests(&self) -> usize {
        let tokens = self.tokens();
        let tail = (0..tokens.len()).find(|&at| is_test_tail(&tokens, at));
        match tail {
            Some(at) => self.line_of(tokens[at].at) - 1,
            None => self.text.lines().count(),
        }
    }

    /// Every function that has a body, nested ones included.
    pub fn functions(&self) -> Vec<Function> {
        let tokens = self.tokens();
        let mut functions = Vec::new();
        for (at, pair) in tokens.windows(2).enumerate() {
            if pair[0].text != "fn" || !is_identifier(pair[1].text) {
                continue;
            }
            let Some(open) = body_of(&tokens, at + 2) else {
                continue;
            };
            let close = closing_brace(&tokens, open).unwrap_or(tokens.len() - 1);
            functions.push(Function {
                name: pair[1].text.to_owned(),
                first_line: self.line_of(pair[0].at),
                last_line: self.line_of(tokens[close].at),
            });
        }
        functions
    }

    /// Every `mod` declaration, inline or not.
    pub fn modules(&self) -> Vec<Module> {
        let tokens = self.tokens();
        let mut modules = Vec::new();
        // One entry for each open brace: the name if it is that of an inline module.
        let mut open: Vec<Option<String>> = Vec::new();
        let mut path = None;
        let mut at = 0;
        while at < tokens.len() {
            match tokens[at].text {
                "mod" if at + 2 < tokens.len() && is_identifier(tokens[at + 1].text) => {
                    let name = tokens[at + 1].text.to_owned();
                    let inline = tokens[at + 2].text == "{";
                    if inline || tokens[at + 2].text == ";" {
                        modules.push(Module {
                            within: open.iter().flatten().cloned().collect(),
                            name: name.clone(),
                            path: path.take(),
                            inline,
                            line: self.line_of(tokens[at].at),
                        });
                    }
                    if inline {
                        open.push(Some(name));
                    }
                    at += 2;
                }
                "{" => open.push(None),
                "}" => drop(open.pop()),
                "path" if is_attribute_value(&tokens, at) => {
                    path = self.literal_after(tokens[at + 1].at);
                }
                ";" => path = None,
                _ => {}
            }
            at += 1;
        }
        modules
    }

    /// The string literal that follows the `=` at this offset.
    fn literal_after(&self, equals: usize) -> Option<String> {
        let rest = self.text[equals + 1..].trim_start().strip_prefix('"')?;
        Some(rest[..rest.find('"')?].to_owned())
    }
}

/// Whether a word is an identifier or keyword, not a number.
pub fn is_identifier(word: &str) -> bool {
    word.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Whether the texts of the tokens from `at` on are these.
pub fn matches_at(tokens: &[Token<'_>], at: usize, texts: &[&str]) -> bool {
    tokens.len() >= at + texts.len()
        && tokens[at..]
            .iter()
            .zip(texts)
            .all(|(token, text)| token.text == *text)
}

fn tokens(code: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut chars = code.char_indices().peekable();
    while let Some((at, first)) = chars.next() {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let mut end = at + first.len_utf8();
        if is_word(first) {
            while let Some((next, letter)) = chars.next_if(|(_, letter)| is_word(*letter)) {
                end = next + letter.len_utf8();
            }
        } else if first.is_whitespace() {
            continue;
        }
        tokens.push(Token {
            at,
            text: &code[at..end],
        });
    }
    tokens
}

/// Whether a `#[cfg(test)] mod name { … }` starts at this token and is the last item.
fn is_test_tail(tokens: &[Token<'_>], at: usize) -> bool {
    let attribute = ["#", "[", "cfg", "(", "test", ")", "]"];
    if !matches_at(tokens, at, &attribute) {
        return false;
    }
    let mut next = at + attribute.len();
    while matches_at(tokens, next, &["#", "["]) {
        let Some(end) = tokens[next..].iter().position(|token| token.text == "]") else {
            return false;
        };
        next += end + 1;
    }
    matches_at(tokens, next, &["mod"])
        && tokens.get(next + 2).is_some_and(|token| token.text == "{")
        && closing_brace(tokens, next + 2) == Some(tokens.len() - 1)
}

/// Whether the token is the name in `#[name = …]`.
fn is_attribute_value(tokens: &[Token<'_>], at: usize) -> bool {
    at >= 2 && matches_at(tokens, at - 2, &["#", "["]) && matches_at(tokens, at + 1, &["="])
}

/// The brace that opens the body of the function whose signature goes on at `from`; none for a
/// declaration that ends in a semicolon.
fn body_of(tokens: &[Token<'_>], from: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(from) {
        match token.text {
            "(" | "[" => depth += 1,
            ")" | "]" => depth = depth.checked_sub(1)?,
            "{" if depth == 0 => return Some(at),
            ";" | "}" if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The brace that closes the one at `open`.
fn closing_brace(tokens: &[Token<'_>], open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.text {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// What a stretch of source is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

fn split(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let mut code = String::with_capacity(text.len());
    let mut comments = String::with_capacity(text.len());
    let mut at = 0;
    while at < bytes.len() {
        let (kind, end) = stretch(bytes, at);
        let piece = &text[at..end];
        let blank: String = piece
            .bytes()
            .map(|byte| if byte == b'\n' { '\n' } else { ' ' })
            .collect();
        code.push_str(if kind == Kind::Code { piece } else { &blank });
        comments.push_str(if kind == Kind::Comment { piece } else { &blank });
        at = end;
    }
    (code, comments)
}

/// The kind and the end of what starts at `at`; always at least one whole character.
fn stretch(bytes: &[u8], at: usize) -> (Kind, usize) {
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        let length = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .unwrap_or(rest.len());
        return (Kind::Comment, at + length);
    }
    if rest.starts_with(b"/*") {
        return (Kind::Comment, at + block_comment_len(rest));
    }
    match rest[0] {
        b'"' => (Kind::Literal, at + quoted_len(rest, b'"')),
        b'r' if !is_word_before(bytes, at) => match raw_string_len(rest) {
            Some(length) => (Kind::Literal, at + length),
            None => (Kind::Code, at + 1),
        },
        b'\'' if is_character(rest) => (Kind::Literal, at + quoted_len(rest, b'\'')),
        _ => (Kind::Code, at + char_len(rest)),
    }
}

/// Whether the byte before belongs to the same word; the prefixes of raw strings do not count.
fn is_word_before(bytes: &[u8], at: usize) -> bool {
    let word = |at: usize| bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_';
    match at.checked_sub(1) {
        None => false,
        Some(before) if matches!(bytes[before], b'b' | b'c') => before > 0 && word(before - 1),
        Some(before) => word(before),
    }
}

fn block_comment_len(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// Length of a literal between quotes, with both quotes.
fn quoted_len(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Length of `r"…"` or `r#"…"#`; none if this is no raw string.
fn raw_string_len(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return None;
    }
    let body = 2 + hashes;
    let mut end = vec![b'"'];
    end.resize(1 + hashes, b'#');
    let length = rest[body..]
        .windows(end.len())
        .position(|window| window == end);
    Some(length.map_or(rest.len(), |length| body + length + end.len()))
}

/// Whether the quote opens a character; otherwise it is that of a lifetime.
fn is_character(rest: &[u8]) -> bool {
    match rest.get(1) {
        None => false,
        Some(b'\\') => true,
        Some(_) => rest.get(1 + char_len(&rest[1..])) == Some(&b'\''),
    }
}

/// Length of the UTF-8 character that starts here.
fn char_len(rest: &[u8]) -> usize {
    let more = rest[1..]
        .iter()
        .take_while(|byte| (**byte & 0xc0) == 0x80)
        .count();
    1 + more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comments_and_literals_are_told_apart() {
        let check = |text: &str, code: &str, comments: &str| {
            let source = RustSource::new(text);
            assert_eq!(source.code.trim_end(), code, "code of {text}");
            assert_eq!(source.comments.trim(), comments, "comments of {text}");
            assert_eq!(
                (source.code.len(), source.comments.len()),
                (text.len(), text.len())
            );
        };
        check("let a = 1; // why", "let a = 1;", "// why");
        check(
            "a /* x /* y */ z */ b",
            "a                   b",
            "/* x /* y */ z */",
        );
        check(r#"f("// no { \" }");"#, "f(              );", "");
        check(r##"f(r#"a " b"#, br"\");"##, "f(          , b    );", "");
        check(
            "if c == '{' || c == '\\'' {}",
            "if c ==     || c ==      {}",
            "",
        );
        check("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}", "");
        check("let größe = 'ß'; // é", "let größe =     ;", "// é");
        check("r#fn(); var", "r#fn(); var", "");
        check("\"open", "", "");
    }

    #[test]
    fn functions_are_found_with_their_lines() {
        let text = "trait T { fn none(&self, a: [u8; 2]); }\nimpl T {\n    fn one(\n        f: fn(u8),\n    ) {\n        fn two() {}\n        call(|| { 1 });\n    }\n}\nmacro_rules! m { () => { fn $name() {} } }\n";
        let found: Vec<_> = RustSource::new(text)
            .functions()
            .into_iter()
            .map(|function| (function.name, function.first_line, function.last_line))
            .collect();
        assert_eq!(found, [("one".to_owned(), 3, 8), ("two".to_owned(), 6, 6)]);
    }

    #[test]
    fn only_a_test_module_at_the_end_is_left_out() {
        let check = |text: &str, lines: usize| {
            assert_eq!(RustSource::new(text).lines_without_tests(), lines, "{text}");
        };
        check("a\nb\n#[cfg(test)]\nmod tests {\n    fn f() {}\n}\n", 2);
        check("a\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n}\n", 1);
        check("a\n#[cfg(test)]\nmod tests {\n}\nfn f() {}\n", 5);
        check("a\n#[cfg(test)]\nuse b;\n", 3);
        check("a\n", 1);
    }

    #[test]
    fn modules_are_found_with_what_surrounds_them() {
        let text = "mod a;\n#[path = \"x/y.rs\"]\npub mod b;\nmod c {\n    pub(crate) mod d;\n    fn f() { }\n    mod e;\n}\n// mod no;\nmod z;\n";
        let found: Vec<_> = RustSource::new(text)
            .modules()
            .into_iter()
            .map(|module| {
                format!(
                    "{}/{}{:?}",
                    module.within.join("/"),
                    module.name,
                    module.path
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                "/aNone",
                "/bSome(\"x/y.rs\")",
                "/cNone",
                "c/dNone",
                "c/eNone",
                "/zNone"
            ]
        );
    }
}
