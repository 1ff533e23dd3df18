// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Command health says how others tell the health of objects: kstatus (Flux, Helm), by its own code,
// and Argo CD, by a script in Lua. Objects are YAML documents on the standard input, the script is
// the argument. Each object is a line: kind/name, kstatus' status, Argo CD's status and its
// message.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	yamldocs "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "health:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("give the script")
	}
	script, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	documents := yamldocs.NewYAMLReader(bufio.NewReader(in))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		o := &unstructured.Unstructured{}
		json, err := yaml.YAMLToJSON(document)
		if err != nil {
			return err
		}
		if string(json) == "null" {
			continue
		}
		if err := o.UnmarshalJSON(json); err != nil {
			return err
		}
		k, err := status.Compute(o)
		if err != nil {
			return err
		}
		health, message, err := argo(string(script), o.Object)
		if err != nil {
			return fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err)
		}
		fmt.Fprintf(out, "%s/%s %s %s %s\n", o.GetKind(), o.GetName(), k.Status, health, message)
	}
}

// argo runs the script as Argo CD does: with the object, and without the libraries that reach
// outside.
func argo(script string, object map[string]any) (health, message string, err error) {
	l := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer l.Close()
	for _, lib := range []struct {
		name string
		open lua.LGFunction
	}{{lua.LoadLibName, lua.OpenPackage}, {lua.BaseLibName, lua.OpenBase}, {lua.TabLibName, lua.OpenTable}} {
		if err := l.CallByParam(lua.P{Fn: l.NewFunction(lib.open), Protect: true}, lua.LString(lib.name)); err != nil {
			return "", "", err
		}
	}
	l.SetGlobal("obj", value(l, object))
	if err := l.DoString(script); err != nil {
		return "", "", err
	}
	table, ok := l.Get(-1).(*lua.LTable)
	if !ok {
		return "", "", errors.New("the script returns no table")
	}
	return table.RawGetString("status").String(), table.RawGetString("message").String(), nil
}

func value(l *lua.LState, v any) lua.LValue {
	switch v := v.(type) {
	case string:
		return lua.LString(v)
	case bool:
		return lua.LBool(v)
	case int64:
		return lua.LNumber(v)
	case float64:
		return lua.LNumber(v)
	case []any:
		t := l.NewTable()
		for _, e := range v {
			t.Append(value(l, e))
		}
		return t
	case map[string]any:
		t := l.NewTable()
		for key, e := range v {
			t.RawSetString(key, value(l, e))
		}
		return t
	}
	return lua.LNil
}
