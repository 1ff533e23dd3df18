// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package objects has what all reconcilers do to the data of their objects.
package objects

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"strings"
)

// NoteMax is how many bytes of a text the note of an Event may hold. The API's limit is 1024.
const NoteMax = 1000

// Clip shortens a text to a number of bytes.
func Clip(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}

// Hash identifies parts by ten hexadecimal digits. Hashes are kept in objects and on nodes: the
// same parts must give the same hash in each version.
func Hash(parts ...any) string {
	b, err := json.Marshal(parts)
	if err != nil {
		return "unhashable" // never: all parts are plain data
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:5])
}

// SortedKeys returns the keys of m in order.
func SortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// Without returns list less the given elements. The list itself stays as it is.
func Without(list []string, elements ...string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(elements, s) })
}

// Writable returns a copy of m that can be written to, although m may be nil.
func Writable(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return maps.Clone(m)
}
