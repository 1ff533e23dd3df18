// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yamledit_test

import (
	"testing"

	"github.com/cri-proxy/cri-proxy/internal/yamledit"

	"go.yaml.in/yaml/v3"
)

func TestSet(t *testing.T) {
	for _, c := range []struct {
		name, doc string
		value     any
		path      []string
		want      string
	}{
		{"empty", "", "x", []string{"a"}, "a: x\n"},
		{"empty, deep", "# only this\n", "x", []string{"a", "b"}, "# only this\na:\n  b: x\n"},
		{"plain", "a: old # why\nb: 1\n", "new", []string{"a"}, "a: new # why\nb: 1\n"},
		{"no newline at the end", "a: old", "new", []string{"a"}, "a: new"},
		{"quoted", `a: "o\"ld" # why` + "\n", "unix:///x", []string{"a"}, `a: "unix:///x" # why` + "\n"},
		{"single quotes", "a: 'o''ld'\n", "new", []string{"a"}, "a: new\n"},
		{"empty string", "a: \"\"\n", ":10260", []string{"a"}, "a: \":10260\"\n"},
		{"nothing there", "a:\nb: 1\n", "x", []string{"a"}, "a: x\nb: 1\n"},
		{"missing", "# top\na: 1\n\n# end\n", "x", []string{"c"}, "# top\na: 1\n\n# end\nc: x\n"},
		{"below", "# top\nops:\n  address: \"\" # such as\n  keyFile: \"\"\n\nz: 1\n", ":1", []string{"ops", "address"},
			"# top\nops:\n  address: \":1\" # such as\n  keyFile: \"\"\n\nz: 1\n"},
		{"missing below", "ops: # the API\n    address: \"\"\n\nz: 1\n", "k", []string{"ops", "enrol", "kubeconfig"},
			"ops: # the API\n    enrol:\n      kubeconfig: k\n    address: \"\"\n\nz: 1\n"},
		{"below nothing", "ops:\nz: 1\n", "k", []string{"ops", "address"}, "ops:\n  address: k\nz: 1\n"},
		{"list", "a: [] # such as\n", []string{"x", "y"}, []string{"a"}, "a: [\"x\",\"y\"] # such as\n"},
		{"block list", "a:\n  - x\n  - z\nb: 1\n", []string{"y"}, []string{"a"}, "a:\n  - \"y\"\nb: 1\n"},
		{"json", "{\"kind\":\"K\",\"a\":\"old\"}", "new", []string{"a"}, "{\"kind\":\"K\",\"a\":\"new\"}"},
		{"json, missing", "{\n  \"kind\": \"K\"\n}\n", "new", []string{"a"},
			"{\n  \"a\": \"new\",\n  \"kind\": \"K\"\n}\n"},
		{"json, empty", "{}\n", "new", []string{"a"}, "{\"a\": \"new\"}\n"},
		{"number and bool", "a: 1\n", true, []string{"a"}, "a: true\n"},
		{"folded", "a: >-\n  o\n  ld\nb: 1\n", "x", []string{"a"}, "a: x\nb: 1\n"},
		{"second document", "---\na: 1\n", "x", []string{"a"}, "---\na: x\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := yamledit.Set([]byte(c.doc), c.value, c.path...)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
	for _, doc := range []string{"- a\n", "a: [1\n", "just text\n", "a: text\n"} {
		if got, err := yamledit.Set([]byte(doc), "x", "a", "b"); err == nil {
			t.Errorf("%q became %q", doc, got)
		}
	}
}

// Whatever the file, the value is set and nothing else changed.
func FuzzSet(f *testing.F) {
	for _, s := range []string{"a: 1\n", "ops:\n  address: x\n", "{\"a\": {\"b\": 1}}", "a: &x 1\nb: *x\n",
		"ops: {address: x, l: ['a]', \"b\"]}\n", "é: 1\nops:   \n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, doc string) {
		var before map[string]any
		if yaml.Unmarshal([]byte(doc), &before) != nil {
			return
		}
		out, err := yamledit.Set([]byte(doc), "unix:///x", "ops", "address")
		if err != nil {
			return
		}
		if v, err := yamledit.Get(out, "ops", "address"); err != nil || v != "unix:///x" {
			t.Fatalf("%q became %q: %v, %v", doc, out, v, err)
		}
	})
}
