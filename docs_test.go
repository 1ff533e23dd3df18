// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criproxy_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documents returns the Markdown files of the tree, and the lines of each that are not code.
func documents(t *testing.T) map[string][]string {
	t.Helper()
	docs := map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == ".run" || d.Name() == "testdata" || path == "bin"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".md"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fenced := false
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				fenced = !fenced
			} else if !fenced && !strings.HasPrefix(line, "    ") {
				docs[path] = append(docs[path], strings.TrimRight(line, "\n"))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

var (
	heading  = regexp.MustCompile(`^#{1,6} +(.*?)#* *$`)
	linkText = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
	// GitHub keeps letters, digits, hyphens and underscores of a heading, and spaces as hyphens.
	notInAnchor = regexp.MustCompile(`[^\p{L}\p{N}_\- ]`)
	codeSpan    = regexp.MustCompile("`[^`]*`")
	link        = regexp.MustCompile(`\]\(<?([^)\s>]+)>?\)|^\[[^\]]+\]: +(\S+)`)
)

func hasAnchor(lines []string, anchor string) bool {
	return slices.ContainsFunc(lines, func(line string) bool {
		m := heading.FindStringSubmatch(line)
		if m == nil {
			return false
		}
		text := strings.ToLower(linkText.ReplaceAllString(m[1], "$1"))
		return strings.ReplaceAll(strings.TrimSpace(notInAnchor.ReplaceAllString(text, "")), " ", "-") == anchor
	})
}

// TestLinks: what a document links to in this tree is there, the heading too.
func TestLinks(t *testing.T) {
	docs := documents(t)
	count := 0
	for file, lines := range docs {
		for _, line := range lines {
			for _, m := range link.FindAllStringSubmatch(codeSpan.ReplaceAllString(line, "`"), -1) {
				target := m[1] + m[2]
				if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
					continue
				}
				count++
				path, anchor, _ := strings.Cut(target, "#")
				to := file
				if path != "" {
					to = filepath.Join(filepath.Dir(file), filepath.FromSlash(path))
				}
				if _, err := os.Stat(to); err != nil {
					t.Errorf("%s links to %s: %v", file, target, err)
				} else if anchor != "" && docs[to] != nil && !hasAnchor(docs[to], anchor) {
					t.Errorf("%s links to %s, but %s has no such heading", file, target, to)
				}
			}
		}
	}
	if count < 50 {
		t.Errorf("only %d links found", count)
	}
}

var braces = regexp.MustCompile(`^(.*)\{(.*)\}$`)

// TestPackageTable: docs/ARCHITECTURE.md says what each package is for. deploy, test and tools
// stand for what is below them.
func TestPackageTable(t *testing.T) {
	var table []string
	for _, line := range documents(t)[filepath.Join("docs", "ARCHITECTURE.md")] {
		cells := strings.Split(line, "|")
		if len(cells) != 4 {
			continue
		}
		for _, span := range codeSpan.FindAllString(cells[1], -1) {
			name := strings.Trim(span, "`")
			if m := braces.FindStringSubmatch(name); m != nil {
				for last := range strings.SplitSeq(m[2], ",") {
					table = append(table, m[1]+last)
				}
			} else {
				table = append(table, name)
			}
		}
	}
	for _, p := range goList(t, "./...") {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		top, _, _ := strings.Cut(name, "/")
		switch {
		case p.ImportPath == module, strings.HasSuffix(name, "test"):
		case slices.Contains([]string{"deploy", "test", "tools"}, top):
		case !slices.Contains(table, name):
			t.Errorf("%s is not in the table of packages", name)
		}
	}
	for _, name := range table {
		if _, err := os.Stat(filepath.FromSlash(name)); err != nil {
			t.Errorf("the table of packages has %s: %v", name, err)
		}
	}
}
