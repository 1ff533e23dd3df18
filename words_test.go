// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criproxy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"strings"
	"testing"
)

// retired are words that meant something only in this project, with the words of docs/GLOSSARY.md
// that took their places. No identifier has one of them as a part: HandOver and handed_over are
// both "hand over" and "handed over".
var retired = map[string]string{
	"conversation": "operation",
	"crew":         "workers",
	"door":         "listener",
	"guest":        "connection",
	"hand over":    "take over (a process), switch over (a container)",
	"handed over":  "taken over (a process), switched over (a container)",
	"handing over": "takeover (of a process), switchover (of a container)",
	"handover":     "takeover (of a process), switchover (of a container)",
	"heir":         "successor",
	"patience":     "timeout",
	"poke":         "refresh",
	"stranger":     "unauthenticated",
	"talk":         "operation, call",
	"turn":         "order, waiter",
	"untold":       "unacknowledged",
	"wish":         "spec",
}

// retiredProse are those of them, and phrases, that comments and documentation do without too. The
// others are plain English there.
var retiredProse = regexp.MustCompile(
	`(?i)\b(ahead of time|conversations?|crews?|heirs?|patience|strangers?|untold|(hand|handed|hands|handing)[- ]overs?)\b`)

// oldWords are the folders and files that [TestWords] leaves out.
var oldWords = []string{
	"controller/",
	"ops/",
	"words_test.go", // it has the list
}

// namesOld are those that tell what the old names were, or why there are others now.
var namesOld = []string{"CHANGELOG.md", "docs/GLOSSARY.md", "docs/adr/"}

var hump = regexp.MustCompile(`([a-z0-9])([A-Z])`)

// retiredIn returns what docs/GLOSSARY.md says instead of a retired word in the identifier, or "".
func retiredIn(identifier string) string {
	name := hump.ReplaceAllString(identifier, "$1 $2")
	name = " " + strings.ToLower(strings.ReplaceAll(name, "_", " ")) + " "
	for word, instead := range retired {
		if strings.Contains(name, " "+word+" ") || strings.Contains(name, " "+word+"s ") {
			return instead
		}
	}
	return ""
}

// TestWords keeps the one vocabulary of docs/GLOSSARY.md.
func TestWords(t *testing.T) {
	known := map[string]string{}
	for _, file := range goFiles(t) {
		if isOneOf(file, oldWords) {
			continue
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, file, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if ast.IsGenerated(f) {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok {
				instead, ok := known[id.Name]
				if !ok {
					instead = retiredIn(id.Name)
					known[id.Name] = instead
				}
				if instead != "" {
					t.Errorf("%s: %s: docs/GLOSSARY.md says %s", fset.Position(id.Pos()), id.Name, instead)
				}
			}
			return true
		})
		for _, group := range f.Comments {
			if word := retiredProse.FindString(strings.ReplaceAll(group.Text(), "\n", " ")); word != "" {
				t.Errorf("%s: a comment says %q, docs/GLOSSARY.md does not", fset.Position(group.Pos()), word)
			}
		}
	}
	for _, file := range textFiles(t, regexp.MustCompile(`\.(md|ya?ml|service|socket|sh|proto)$`)) {
		if isOneOf(file, oldWords) || isOneOf(file, namesOld) || isOneOf(file, generated) {
			continue
		}
		for i, line := range lines(t, file) {
			if word := retiredProse.FindString(line); word != "" {
				t.Errorf("%s:%d: %q is not in docs/GLOSSARY.md", file, i+1, word)
			}
		}
	}
}
