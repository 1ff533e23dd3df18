// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package yamledit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Set returns doc with the value at path, a list of keys from the top. value is a string, bool,
// number, or a list of strings. Keys that are missing are added. An empty doc is an empty mapping.
// It is an error if doc is no mapping, or what path leads through is none.
func Set(doc []byte, value any, path ...string) ([]byte, error) {
	if len(path) == 0 {
		return nil, errors.New("no key")
	}
	want := map[string]any{}
	if err := yaml.Unmarshal(doc, &want); err != nil {
		return nil, err
	}
	if want == nil {
		want = map[string]any{}
	}
	if err := put(want, plain(value), path); err != nil {
		return nil, err
	}
	if out, ok := setText(doc, value, path); ok && holds(out, want) {
		return out, nil
	}
	out, err := setTree(doc, value, path)
	if err != nil {
		return nil, err
	}
	if !holds(out, want) {
		return nil, fmt.Errorf("%s cannot be set in this file", strings.Join(path, "."))
	}
	return out, nil
}

// Get returns the value at path, nil if there is none.
func Get(doc []byte, path ...string) (any, error) {
	top := map[string]any{}
	if err := yaml.Unmarshal(doc, &top); err != nil {
		return nil, err
	}
	var v any = top
	for _, key := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil, nil
		}
		v = m[key]
	}
	return v, nil
}

// plain is the value as YAML reads it.
func plain(value any) any {
	b, err := yaml.Marshal(value)
	if err != nil {
		return value
	}
	var v any
	if yaml.Unmarshal(b, &v) != nil {
		return value
	}
	return v
}

func put(m map[string]any, value any, path []string) error {
	for i, key := range path[:len(path)-1] {
		next, ok := m[key].(map[string]any)
		if !ok {
			if m[key] != nil {
				return fmt.Errorf("%s is no mapping", strings.Join(path[:i+1], "."))
			}
			next = map[string]any{}
			m[key] = next
		}
		m = next
	}
	m[path[len(path)-1]] = value
	return nil
}

func holds(doc []byte, want map[string]any) bool {
	var got map[string]any
	return yaml.Unmarshal(doc, &got) == nil && reflect.DeepEqual(got, want)
}

// setText changes the text itself. It reports whether it knows how.
func setText(doc []byte, value any, path []string) ([]byte, bool) {
	var root yaml.Node
	if err := yaml.Unmarshal(doc, &root); err != nil || bytes.Contains(doc, []byte("\n...")) ||
		bytes.Contains(doc, []byte("\n---")) {
		return nil, false
	}
	text := lines(doc)
	if len(root.Content) == 0 {
		return text.append(blockEntry(0, path, value)), true
	}
	at := root.Content[0]
	var parentKey *yaml.Node
	for i, key := range path {
		if at.Kind != yaml.MappingNode {
			if at.Tag == "!!null" && at.Value == "" && parentKey != nil {
				return text.insert(parentKey.Line, blockEntry(parentKey.Column-1+2, path[i:], value)), true
			}
			return nil, false
		}
		k, v := entry(at, key)
		if k == nil {
			return text.add(at, parentKey, path[i:], value)
		}
		parentKey, at = k, v
	}
	return text.replace(at, value)
}

// entry returns a key of a mapping and its value.
func entry(m *yaml.Node, key string) (k, v *yaml.Node) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return m.Content[i], m.Content[i+1]
		}
	}
	return nil, nil
}

// textLines are the lines of a document with their ends.
type textLines []string

func lines(doc []byte) textLines { return slices.Collect(strings.Lines(string(doc))) }

func (t textLines) bytes() []byte { return []byte(strings.Join(t, "")) }

// append adds at the end.
func (t textLines) append(s string) []byte {
	t = slices.Clone(t)
	if n := len(t); n > 0 && !strings.HasSuffix(t[n-1], "\n") {
		t[n-1] += "\n"
	}
	return append(t, s).bytes()
}

// insert adds after a line, counted from 1.
func (t textLines) insert(line int, s string) []byte {
	if line >= len(t) {
		return t.append(s)
	}
	return slices.Insert(slices.Clone(t), line, s).bytes()
}

// add adds keys to a mapping, whose own key is parent, nil for the top.
func (t textLines) add(m, parent *yaml.Node, path []string, value any) ([]byte, bool) {
	if m.Style&yaml.FlowStyle != 0 {
		return t.addToFlow(m, path, value)
	}
	if len(m.Content) == 0 {
		return nil, false
	}
	indent := m.Content[0].Column - 1
	if parent == nil {
		return t.append(blockEntry(indent, path, value)), true
	}
	return t.insert(parent.Line, blockEntry(indent, path, value)), true
}

// addToFlow adds keys to a mapping in braces, as JSON has.
func (t textLines) addToFlow(m *yaml.Node, path []string, value any) ([]byte, bool) {
	for _, key := range slices.Backward(path[1:]) {
		value = map[string]any{key: value}
	}
	v, err := json.Marshal(value)
	if err != nil || m.Line > len(t) {
		return nil, false
	}
	line := t[m.Line-1]
	at := offset(line, m.Column)
	if at >= len(line) || line[at] != '{' {
		return nil, false
	}
	s := fmt.Sprintf("%q: %s", path[0], v)
	if len(m.Content) > 0 {
		s += ","
		if m.Content[0].Line == m.Line {
			s += " "
		} else { // as the next one stands
			s = "\n" + strings.Repeat(" ", max(m.Content[0].Column-1, 0)) + s
		}
	}
	t = slices.Clone(t)
	t[m.Line-1] = line[:at+1] + s + line[at+1:]
	return t.bytes(), true
}

// replace puts another value in the place of one on a single line.
func (t textLines) replace(old *yaml.Node, value any) ([]byte, bool) {
	if old.Line == 0 || old.Line > len(t) || old.Anchor != "" || old.Kind == yaml.AliasNode {
		return nil, false
	}
	line := t[old.Line-1]
	from := offset(line, old.Column)
	end, ok := tokenEnd(line[from:], old)
	if !ok {
		return nil, false
	}
	s := scalar(value)
	if old.Style&yaml.DoubleQuotedStyle != 0 || strings.HasPrefix(line[from:], "[") {
		b, err := json.Marshal(value)
		if err != nil {
			return nil, false
		}
		if _, list := value.([]string); !list || old.Kind == yaml.SequenceNode {
			s = string(b)
		}
	}
	if from == end+from && !strings.HasSuffix(line[:from], " ") { // nothing was there: "key:"
		s = " " + s
	}
	t = slices.Clone(t)
	t[old.Line-1] = line[:from] + s + line[from+end:]
	return t.bytes(), true
}

// tokenEnd is how long the text of a node is.
func tokenEnd(s string, n *yaml.Node) (int, bool) {
	switch {
	case n.Kind == yaml.SequenceNode && strings.HasPrefix(s, "["):
		return listEnd(s)
	case n.Kind != yaml.ScalarNode:
		return 0, false
	case n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		return quotedEnd(s)
	case n.Style == 0 || n.Style == yaml.TaggedStyle:
		return len(n.Value), strings.HasPrefix(s, n.Value)
	}
	return 0, false
}

// quotedEnd is how long the quoted string is that s begins with.
func quotedEnd(s string) (int, bool) {
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\' && s[0] == '"', s[i] == '\'' && s[0] == '\'' && i+1 < len(s) && s[i+1] == '\'':
			i++
		case s[i] == s[0]:
			return i + 1, true
		}
	}
	return 0, false
}

// listEnd is how long the list in brackets is that s begins with.
func listEnd(s string) (int, bool) {
	depth := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '"', '\'':
			n, ok := quotedEnd(s[i:])
			if !ok {
				return 0, false
			}
			i += n - 1
		case '[':
			depth++
		case ']':
			if depth--; depth == 0 {
				return i + 1, true
			}
		}
	}
	return 0, false
}

// offset is where a column, which counts characters from 1, is in a line.
func offset(line string, column int) int {
	n := 1
	for i := range line {
		if n == column {
			return i
		}
		n++
	}
	return len(strings.TrimRight(line, "\r\n"))
}

// scalar is a value on one line.
func scalar(value any) string {
	if list, ok := value.([]string); ok {
		b, err := json.Marshal(list) // JSON is YAML
		if err == nil {
			return string(b)
		}
	}
	b, err := yaml.Marshal(value)
	if s := strings.TrimSuffix(string(b), "\n"); err == nil && !strings.Contains(s, "\n") {
		return s
	}
	b, _ = json.Marshal(value)
	return string(b)
}

// blockEntry is keys one below the other, and the value.
func blockEntry(indent int, path []string, value any) string {
	var b strings.Builder
	for i, key := range path {
		fmt.Fprintf(&b, "%s%s:", strings.Repeat(" ", indent+2*i), key)
		if i < len(path)-1 {
			b.WriteByte('\n')
		}
	}
	fmt.Fprintf(&b, " %s\n", scalar(value))
	return b.String()
}

// setTree writes the document anew; comments stay, blank lines do not.
func setTree(doc []byte, value any, path []string) ([]byte, error) {
	var root yaml.Node
	if err := yaml.Unmarshal(doc, &root); err != nil {
		return nil, err
	}
	if len(root.Content) == 0 {
		root = yaml.Node{Kind: yaml.DocumentNode, Content: []*yaml.Node{{Kind: yaml.MappingNode, Tag: "!!map"}}}
	}
	at := root.Content[0]
	for _, key := range path {
		if at.Kind != yaml.MappingNode {
			if at.Tag != "!!null" {
				return nil, fmt.Errorf("%s: not below a mapping", strings.Join(path, "."))
			}
			*at = yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		}
		_, v := entry(at, key)
		if v == nil {
			v = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"}
			at.Content = append(at.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key}, v)
		}
		at = v
	}
	if err := at.Encode(value); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(&root); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
