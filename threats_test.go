// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criproxy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestThreats: each line of docs/THREATS.md names tests that are there. A test is [TestName](its
// file), or [TestName: a case of its table](its file); what begins otherwise is a case of some test
// of that file. One in lower case is a step of a test.
func TestThreats(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("docs", "THREATS.md"))
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\[([^\]]+)\]\(\.\./([^)]+_test\.go)\)`)
	named := regexp.MustCompile(`^([Tt]est\w*)(?:: (.+))?$`)
	lines := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], "---") || strings.TrimSpace(cells[3]) == "tests" {
			if len(cells) > 1 && len(cells) != 5 {
				t.Errorf("a line has %d cells, want 3: %s", len(cells)-2, line)
			}
			continue
		}
		lines++
		links := link.FindAllStringSubmatch(cells[3], -1)
		if len(links) == 0 {
			t.Errorf("no test: %s", line)
		}
		if rest := strings.Trim(link.ReplaceAllString(cells[3], ""), " ,"); rest != "" {
			t.Errorf("%q is no test: write [TestName](../path/to/its_test.go)", rest)
		}
		for _, l := range links {
			source, err := os.ReadFile(filepath.FromSlash(l[2]))
			if err != nil {
				t.Errorf("%s: %v", l[1], err)
				continue
			}
			function, subtest := "", l[1]
			if m := named.FindStringSubmatch(l[1]); m != nil {
				function, subtest = m[1], m[2]
			}
			if function != "" && !strings.Contains(string(source), "\nfunc "+function+"(t *testing.T)") {
				t.Errorf("%s has no test %s: %s", l[2], function, line)
			}
			if subtest != "" && !strings.Contains(string(source), `"`+subtest+`"`) {
				t.Errorf("%s has no case %q: %s", l[2], subtest, line)
			}
			if strings.HasPrefix(function, "test") && !isCalled(t, filepath.Dir(filepath.FromSlash(l[2])), function) {
				t.Errorf("no test of %s has the step %s", l[2], function)
			}
		}
	}
	if lines < 20 {
		t.Errorf("docs/THREATS.md has %d lines", lines)
	}
}

// isCalled says that a function of a package is named elsewhere than where it is made.
func isCalled(t *testing.T, dir, function string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	word := regexp.MustCompile(`\b` + function + `\b`)
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		rest := strings.ReplaceAll(string(source), "func "+function+"(", "")
		for line := range strings.Lines(rest) {
			if !strings.HasPrefix(strings.TrimSpace(line), "//") && word.MatchString(line) {
				return true
			}
		}
	}
	return false
}
