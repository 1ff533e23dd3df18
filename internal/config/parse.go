// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Parse reads YAML into c and leaves what the text does not mention as it was. It is strict:
// unknown and repeated keys, and values of another type, are errors. Parse returns all of them in
// one error, each with name:line:column.
func Parse(name string, text []byte, c *Config) error {
	d := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := d.Decode(&doc); errors.Is(err, io.EOF) {
		return nil // empty, or comments only
	} else if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var more yaml.Node
	if err := d.Decode(&more); err == nil {
		return fmt.Errorf("%s:%d:%d: a second document: one file is one configuration", name, more.Line, more.Column)
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", name, err)
	}
	p := parser{file: name}
	p.value(doc.Content[0], "", reflect.ValueOf(c).Elem())
	return errors.Join(p.errs...)
}

type parser struct {
	file string
	errs []error
}

func (p *parser) errorf(n *yaml.Node, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s:%d:%d: %s", p.file, n.Line, n.Column, fmt.Sprintf(format, args...)))
}

// value stores the node in v. key is its dotted path, for messages.
func (p *parser) value(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // "key:" with nothing behind it keeps the default
	}
	switch at := v.Addr().Interface().(type) {
	case *Mode:
		// A bare 0600 is a number in YAML; its digits are meant.
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" && n.Tag != "!!int" {
			p.errorf(n, "%s: want octal digits such as \"0600\", got %s", key, describe(n))
		} else if err := at.Set(n.Value); err != nil {
			p.errorf(n, "%s: %v", key, err)
		}
		return
	case *DiskPercent:
		if n.Kind != yaml.ScalarNode {
			p.errorf(n, "%s: want a number, or kubelet, got %s", key, describe(n))
		} else if err := at.Set(n.Value); err != nil {
			p.errorf(n, "%s: %v", key, err)
		}
		return
	case *time.Duration:
		if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
			p.errorf(n, "%s: want a duration such as 30m or 90s, got %s", key, describe(n))
		} else if parsed, err := time.ParseDuration(n.Value); err != nil {
			p.errorf(n, "%s: want a duration such as 30m or 90s, got %q", key, n.Value)
		} else {
			*at = parsed
		}
		return
	case *string:
		// Numbers and booleans are words here too: a node may be named 42.
		if n.Kind != yaml.ScalarNode {
			p.errorf(n, "%s: want a string, got %s", key, describe(n))
			return
		}
		*at = n.Value
		return
	}
	switch v.Kind() {
	case reflect.Int, reflect.Int64:
		if i, err := strconv.ParseInt(n.Value, 10, 64); n.Kind != yaml.ScalarNode || err != nil {
			p.errorf(n, "%s: want a whole number, got %s", key, describe(n))
		} else {
			v.SetInt(i)
		}
	case reflect.Float64:
		f, err := strconv.ParseFloat(n.Value, 64)
		if n.Kind != yaml.ScalarNode || err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
			p.errorf(n, "%s: want a number, got %s", key, describe(n))
		} else {
			v.SetFloat(f)
		}
	case reflect.Bool:
		switch {
		case n.Kind == yaml.ScalarNode && n.Value == "true":
			v.SetBool(true)
		case n.Kind == yaml.ScalarNode && n.Value == "false":
			v.SetBool(false)
		default:
			p.errorf(n, "%s: want true or false, got %s", key, describe(n))
		}
	case reflect.Struct:
		p.mapping(n, key, v)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			p.errorf(n, "%s: want a list, got %s", key, describe(n))
			return
		}
		list := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
		for i, e := range n.Content {
			p.value(e, key+"["+strconv.Itoa(i)+"]", list.Index(i))
		}
		v.Set(list)
	default:
		p.errorf(n, "%s: cannot be set in a file", key)
	}
}

func (p *parser) mapping(n *yaml.Node, key string, v reflect.Value) {
	if n.Kind != yaml.MappingNode {
		what := key
		if what == "" {
			what = "the configuration"
		}
		p.errorf(n, "%s: want keys and values, got %s", what, describe(n))
		return
	}
	fields := map[string]reflect.Value{}
	sameAs := map[string]string{} // the old name of a renamed key
	var names []string
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag.Get("yaml")
		if tag == "-" {
			continue
		}
		fields[tag] = v.Field(i)
		names = append(names, tag)
		if renamed, ok := RenamedKeys()[tag]; ok {
			fields[renamed], sameAs[renamed] = v.Field(i), tag
			names = append(names, renamed)
		}
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		field, ok := fields[k.Value]
		path := strings.TrimPrefix(key+"."+k.Value, ".")
		setting := k.Value
		if tag, ok := sameAs[setting]; ok {
			setting = tag
		}
		switch line, again := seen[setting]; {
		case !ok:
			p.errorf(k, "unknown key %q%s", path, suggestion(key, k.Value, names))
		case again:
			p.errorf(k, "%s: already set in line %d", path, line)
		default:
			p.value(n.Content[i+1], path, field)
		}
		seen[setting] = k.Line
	}
}

// suggestion returns the nearest of the valid keys, or all of them if none is near.
func suggestion(parent, key string, valid []string) string {
	best, distance := "", len(key)
	for _, v := range valid {
		if d := editDistance(strings.ToLower(key), strings.ToLower(v)); d < distance {
			best, distance = v, d
		}
	}
	prefix := ""
	if parent != "" {
		prefix = parent + "."
	}
	if best != "" && distance <= 1+len(best)/3 {
		return fmt.Sprintf(", did you mean %q?", prefix+best)
	}
	if parent == "" {
		return "; valid keys: " + strings.Join(valid, ", ")
	}
	return fmt.Sprintf("; valid keys of %s: %s", parent, strings.Join(valid, ", "))
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys and values"
	case yaml.SequenceNode:
		return "a list"
	default:
		return strconv.Quote(n.Value)
	}
}
