// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment

import (
	"fmt"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// Apply puts the environment into the config of the next attempt of a container, which is that of
// the attempt before it. podDir is kubelet's directory of the pod, see [PodDir]; it may be empty if
// nothing of env is in a volume.
//
// kubelet makes the list of variables from a Go map, so that their order means nothing
// (kubelet_pods.go makeEnvironmentVariables); here it is that of the spec, services last.
//
// Errors: what kubelet would not start the container for.
func Apply(c *runtimeapi.ContainerConfig, env *opsv1.Environment, podDir string) (Parts, error) {
	v := variables{of: map[string]string{}, services: map[string]string{}}
	for _, s := range env.GetServices() {
		v.services[s.GetName()] = string(s.GetValue())
	}
	for _, d := range env.GetVariables() {
		if err := v.declare(d, podDir); err != nil {
			return nil, err
		}
	}
	var envs []*runtimeapi.KeyValue
	if env.GetDeviceVariables() {
		envs = v.leading(c.GetEnvs())
	}
	all := map[string]string{}
	for _, kv := range envs {
		all[kv.GetKey()] = string(kv.GetValue())
	}
	for _, name := range v.names {
		envs = append(envs, &runtimeapi.KeyValue{Key: name, Value: []byte(v.of[name])})
		all[name] = v.of[name]
	}
	for _, s := range env.GetServices() {
		if _, declared := v.of[s.GetName()]; !declared {
			envs = append(envs, &runtimeapi.KeyValue{Key: s.GetName(), Value: s.GetValue()})
			all[s.GetName()] = string(s.GetValue())
		}
	}
	c.Envs = envs
	c.Command, c.Args = expandAll(env.GetCommand(), all), expandAll(env.GetArgs(), all)
	paths := map[string]SubPath{}
	for _, s := range env.GetSubPaths() {
		path := s.GetPath()
		if s.GetExpand() {
			var err error
			if path, err = expandPath(path, all); err != nil {
				return nil, err
			}
		}
		// As kubelet says it (kubelet_pods.go makeMounts).
		switch {
		case strings.HasPrefix(path, "/"):
			return nil, fmt.Errorf("error SubPath `%s` must not be an absolute path", path)
		case slices.Contains(strings.Split(path, "/"), ".."):
			return nil, fmt.Errorf("unable to provision SubPath `%s`: must not contain '..'", path)
		}
		paths[s.GetContainerPath()] = SubPath{Volume: s.GetVolume(), Path: path, Dir: s.GetHostPath(),
			Persistent: s.GetPersistentVolume(), Expanded: s.GetExpand()}
	}
	return Refresh(c, podDir, paths)
}

// variables are what the container declares.
type variables struct {
	names    []string // in the order of their first declaration
	of       map[string]string
	services map[string]string
}

func (v *variables) declare(d *opsv1.Variable, podDir string) error {
	value := ""
	switch s := d.GetSource().(type) {
	case *opsv1.Variable_Value:
		value = string(s.Value)
	case *opsv1.Variable_Template:
		value = expand(s.Template, func(name string) string {
			for _, m := range []map[string]string{v.of, v.services} {
				if value, ok := m[name]; ok {
					return value
				}
			}
			return "$(" + name + ")"
		})
	case *opsv1.Variable_File:
		var err error
		if value, err = fromFile(s.File, podDir); err != nil {
			return err
		}
		if value == "" && s.File.GetOptional() {
			return nil
		}
	}
	if _, twice := v.of[d.GetName()]; !twice {
		v.names = append(v.names, d.GetName())
	}
	v.of[d.GetName()] = value
	return nil
}

// leading returns the variables that stand before the first one that the container declares or has
// of a service: device plugins' come first (kubelet_pods.go GenerateRunContainerOptions).
func (v *variables) leading(envs []*runtimeapi.KeyValue) []*runtimeapi.KeyValue {
	end := slices.IndexFunc(envs, func(kv *runtimeapi.KeyValue) bool {
		_, declared := v.of[kv.GetKey()]
		_, service := v.services[kv.GetKey()]
		return declared || service
	})
	if end < 0 {
		end = len(envs)
	}
	return slices.Clone(envs[:end])
}

// expandAll replaces the references in the words of a command line; those to nothing stay
// (pkg/kubelet/container/helpers.go ExpandContainerCommandAndArgs).
func expandAll(words []string, values map[string]string) []string {
	var out []string
	for _, w := range words {
		out = append(out, expand(w, func(name string) string {
			if value, ok := values[name]; ok {
				return value
			}
			return "$(" + name + ")"
		}))
	}
	return out
}

// expandPath replaces the references in a subPathExpr, of which none may be to nothing
// (pkg/kubelet/container/helpers.go ExpandContainerVolumeMounts).
func expandPath(path string, values map[string]string) (string, error) {
	var without []string
	out := expand(path, func(name string) string {
		if values[name] == "" && !slices.Contains(without, name) {
			without = append(without, name)
		}
		return values[name]
	})
	if len(without) > 0 {
		slices.Sort(without)
		return "", fmt.Errorf("missing value for %s", strings.Join(without, ", "))
	}
	return out, nil
}

// expand replaces each $(NAME) by what value gives for it. $$ is a $ that begins no reference, and
// what is no reference stays as it is (third_party/forked/golang/expansion in Kubernetes).
func expand(s string, value func(name string) string) string {
	var out strings.Builder
	for {
		at := strings.IndexByte(s, '$')
		if at < 0 || at == len(s)-1 {
			out.WriteString(s)
			return out.String()
		}
		out.WriteString(s[:at])
		s = s[at+1:]
		switch s[0] {
		case '$':
			out.WriteByte('$')
			s = s[1:]
		case '(':
			if end := strings.IndexByte(s, ')'); end > 0 {
				out.WriteString(value(s[1:end]))
				s = s[end+1:]
			} else {
				out.WriteString("$(")
				s = s[1:]
			}
		default:
			out.WriteByte('$')
		}
	}
}
