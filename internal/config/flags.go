// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"

	"github.com/spf13/pflag"
)

// Given are the flags that were set on the command line, with their values. [Config.Flags] writes
// into a Config. A file that is read into the same Config later overwrites the values, and Apply
// puts them back.
type Given struct {
	flags []*pflag.Flag
	// values and lists have the value of each flag; one of the two is used.
	values []string
	lists  [][]string
}

// GivenIn returns the flags of fs that were set. A nil fs has none.
func GivenIn(fs *pflag.FlagSet) Given {
	var g Given
	if fs == nil {
		return g
	}
	fs.Visit(func(f *pflag.Flag) {
		var list []string
		if s, ok := f.Value.(pflag.SliceValue); ok {
			list = s.GetSlice()
		}
		g.flags, g.values, g.lists = append(g.flags, f), append(g.values, f.Value.String()), append(g.lists, list)
	})
	return g
}

// Has reports whether the flag was set.
func (g Given) Has(name string) bool {
	for _, f := range g.flags {
		if FlagName(f) == name {
			return true
		}
	}
	return false
}

// Apply sets the flags to their values again.
func (g Given) Apply() error {
	for i, f := range g.flags {
		var err error
		if s, ok := f.Value.(pflag.SliceValue); ok {
			err = s.Replace(g.lists[i])
		} else {
			err = f.Value.Set(g.values[i])
		}
		if err != nil {
			return &InvalidError{fmt.Errorf("--%s: %w", f.Name, err)}
		}
	}
	return nil
}

// renamedTo is the annotation of a flag that is the old name of another one.
const renamedTo = "cri-proxy.io/renamed-to"

// RenamedFlag lets the flag name be given by its old name too. Help does not show the old name.
func RenamedFlag(fs *pflag.FlagSet, old, name string) {
	f := fs.Lookup(name)
	fs.AddFlag(&pflag.Flag{
		Name: old, Usage: "old name of --" + name, Value: f.Value, DefValue: f.DefValue, NoOptDefVal: f.NoOptDefVal,
		Hidden: true, Annotations: map[string][]string{renamedTo: {name}},
	})
}

// FlagName returns the name of a flag: for an old name, the one that has replaced it.
func FlagName(f *pflag.Flag) string {
	if to := f.Annotations[renamedTo]; len(to) == 1 {
		return to[0]
	}
	return f.Name
}
