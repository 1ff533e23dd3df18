// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criproxy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	codeWidth  = 120 // lll in .golangci.yml holds it too, but cannot tell a raw string from code
	proseWidth = 100
	tabWidth   = 4
)

// generated are files that a tool writes, besides Go files that say so.
var generated = []string{"deploy/crds/", "deploy/rbac/role.yaml", "deploy/helm/cri-proxy/files/"}

// isOneOf reports whether the path is one of the files, or in one of the folders, which end in /.
func isOneOf(path string, list []string) bool {
	return slices.ContainsFunc(list, func(p string) bool {
		return path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(path, p)
	})
}

// textFiles returns the files of the repository whose names match, without testdata.
func textFiles(t *testing.T, name *regexp.Regexp) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		hidden := strings.HasPrefix(d.Name(), ".") && path != "." && path != ".github" && path != ".ci"
		switch {
		case err != nil:
			return err
		case d.IsDir() && (hidden || d.Name() == "testdata" || path == "bin"):
			return filepath.SkipDir
		case !d.IsDir() && name.MatchString(path):
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func width(line string) int {
	return utf8.RuneCountInString(line) + (tabWidth-1)*strings.Count(line, "\t")
}

// TestWidths keeps code at most 120 columns wide, and comments and documentation at most 100.
func TestWidths(t *testing.T) {
	check := func(file string, find func(*testing.T, string) []int) {
		if isOneOf(file, generated) {
			return
		}
		for _, line := range find(t, file) {
			t.Errorf("%s:%d: too wide: code has at most %d columns, comments and prose %d",
				file, line, codeWidth, proseWidth)
		}
	}
	for _, file := range goFiles(t) {
		check(file, wideGo)
	}
	for _, file := range textFiles(t, regexp.MustCompile(`\.md$`)) {
		check(file, wideMarkdown)
	}
	hash := regexp.MustCompile(`\.(ya?ml|sh|service|socket|conf)$|(^|/)(Makefile|run|crash-guard|p(re|ost)(inst|rm))$`)
	for _, file := range textFiles(t, hash) {
		check(file, func(t *testing.T, file string) []int { return wideComments(t, file, "#") })
	}
	for _, file := range textFiles(t, regexp.MustCompile(`\.proto$`)) {
		check(file, func(t *testing.T, file string) []int { return wideComments(t, file, "//") })
	}
}

func lines(t *testing.T, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(string(b), "\n")
}

// wideComment reports whether a line that is a comment is too wide. One word, such as an address,
// cannot be wrapped.
func wideComment(line, mark string) bool {
	text := strings.TrimPrefix(strings.TrimSpace(line), mark)
	return width(line) > proseWidth && len(strings.Fields(text)) > 1
}

// wideGo returns the numbers of the lines that are too wide. Raw strings are left out, for they are
// manifests, tables and programs.
func wideGo(t *testing.T, file string) (wide []int) {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	if ast.IsGenerated(f) {
		return nil
	}
	raw := map[int]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.BasicLit); ok && s.Kind == token.STRING && strings.HasPrefix(s.Value, "`") {
			for l := fset.Position(s.Pos()).Line; l <= fset.Position(s.End()).Line; l++ {
				raw[l] = true
			}
		}
		return true
	})
	directive := regexp.MustCompile(`^(//go:|//nolint|// ?\+kubebuilder:)`)
	for i, line := range lines(t, file) {
		text := strings.TrimSpace(line)
		switch {
		case raw[i+1], directive.MatchString(text):
		case strings.HasPrefix(text, "//") && wideComment(line, "//"), width(line) > codeWidth:
			wide = append(wide, i+1)
		}
	}
	return wide
}

// wideMarkdown leaves out what cannot be wrapped: fenced blocks, tables and link definitions.
func wideMarkdown(t *testing.T, file string) (wide []int) {
	t.Helper()
	definition := regexp.MustCompile(`^\[[^\]]+\]: `)
	fenced := false
	for i, line := range lines(t, file) {
		text := strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(text, "```"):
			fenced = !fenced
		case fenced, strings.HasPrefix(text, "|"), definition.MatchString(line):
		case wideComment(line, ""):
			wide = append(wide, i+1)
		}
	}
	return wide
}

// wideComments returns the comments that are too wide of a file in which mark begins one.
func wideComments(t *testing.T, file, mark string) (wide []int) {
	t.Helper()
	for i, line := range lines(t, file) {
		if strings.HasPrefix(strings.TrimSpace(line), mark) && wideComment(line, mark) {
			wide = append(wide, i+1)
		}
	}
	return wide
}
