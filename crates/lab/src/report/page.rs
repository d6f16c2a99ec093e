//! Text of an HTML page. Everything that is put into it is escaped, but what we draw ourselves.

/// A page that is being written.
#[derive(Debug)]
pub(super) struct Page {
    text: String,
}

impl Page {
    /// With a title and a style of its own.
    pub(super) fn new(title: &str, style: &'static str) -> Self {
        let mut page = Self {
            text: "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
                   <meta name=\"viewport\" content=\"width=device-width\">\n"
                .to_owned(),
        };
        page.element("title", title);
        page.text.push_str("<style>\n");
        page.text.push_str(style);
        page.text.push_str("</style>\n</head>\n<body>\n");
        page
    }

    /// Text.
    pub(super) fn text(&mut self, text: &str) {
        escape(text, &mut self.text);
    }

    /// An element with nothing but text in it.
    pub(super) fn element(&mut self, tag: &'static str, text: &str) {
        self.classed(tag, "", text);
    }

    /// The same with a class.
    pub(super) fn classed(&mut self, tag: &'static str, class: &'static str, text: &str) {
        self.open(tag, class);
        self.text(text);
        self.close(tag);
    }

    /// Begins an element; no class if it is empty.
    pub(super) fn open(&mut self, tag: &'static str, class: &'static str) {
        self.text.push('<');
        self.text.push_str(tag);
        if !class.is_empty() {
            self.text.push_str(" class=\"");
            self.text.push_str(class);
            self.text.push('"');
        }
        self.text.push('>');
    }

    /// Ends it.
    pub(super) fn close(&mut self, tag: &'static str) {
        self.text.push_str("</");
        self.text.push_str(tag);
        self.text.push_str(">\n");
    }

    /// A square of a colour and what it stands for.
    pub(super) fn key(&mut self, (red, green, blue): (u8, u8, u8), text: &str) {
        let colour = format!("#{red:02x}{green:02x}{blue:02x}");
        let square = format!("<span class=\"key\" style=\"background: {colour}\"></span>");
        self.text.push_str(&square);
        self.text(text);
    }

    /// A drawing, as the drawing crate made it: it escapes its own texts. Within a page it needs no
    /// name space, and without one the page names no other place.
    pub(super) fn drawing(&mut self, svg: &str) {
        self.text
            .push_str(&svg.replace(" xmlns=\"http://www.w3.org/2000/svg\"", ""));
    }

    /// The file.
    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</body>\n</html>\n");
        self.text
    }
}

fn escape(text: &str, into: &mut String) {
    for letter in text.chars() {
        match letter {
            '&' => into.push_str("&amp;"),
            '<' => into.push_str("&lt;"),
            '>' => into.push_str("&gt;"),
            '"' => into.push_str("&quot;"),
            '\'' => into.push_str("&#39;"),
            letter => into.push(letter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_anything_else() {
        let mut page = Page {
            text: String::new(),
        };
        page.classed("p", "a", "<script>'\"&</script>");
        page.key((0, 128, 255), "<b>");
        assert_eq!(
            page.text,
            "<p class=\"a\">&lt;script&gt;&#39;&quot;&amp;&lt;/script&gt;</p>\n\
             <span class=\"key\" style=\"background: #0080ff\"></span>&lt;b&gt;"
        );
    }
}
