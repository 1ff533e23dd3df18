// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/internal/yamledit"
)

// Edit is a change of a file of kubelet's configuration.
type Edit struct {
	Path string
	// Before is nil if there is no such file.
	Before, After []byte
	Mode          os.FileMode
}

const (
	// dropInName is the name of our file in --config-dir; lateName is for a directory with later
	// files.
	dropInName, lateName = "99-cri-proxy.conf", "zz-cri-proxy.conf"
	// unitDropIn comes after kubeadm's 10-kubeadm.conf.
	unitDropIn = "zz-cri-proxy.conf"
	// instanceConfig is a file that kubeadm applies to kubelet's configuration whenever it writes
	// that (kubeadm upgrade).
	instanceConfig = "instance-config.yaml"

	dropInHead = "# Written by cri-proxy install; cri-proxy uninstall takes it away.\n"
	dropInKind = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
)

// Point returns the edits after which kubelet dials an endpoint, a path or unix:// URL. There are
// none if kubelet dials it already. If the endpoint for images is the runtime too, it changes as
// well.
func (k *Kubelet) Point(endpoint string) ([]Edit, error) {
	path, err := config.SocketPath(endpoint)
	if err != nil {
		return nil, err
	}
	endpoint = "unix://" + path // kubelet will not take a path for ever
	runtime, err := k.setting(endpoints.runtime[0], endpoints.runtime[1])
	if err != nil {
		return nil, err
	}
	image, err := k.setting(endpoints.image[0], endpoints.image[1])
	if err != nil {
		return nil, err
	}
	p := &pointing{kubelet: k, to: endpoint, files: map[string]*Edit{}}
	was := runtime.value
	if was == "" {
		was = defaultEndpoint
	}
	if !same(was, endpoint) {
		if err := p.set(runtime, endpoints.runtime[0], endpoints.runtime[1]); err != nil {
			return nil, err
		}
	}
	if image.value != "" && same(image.value, was) && !same(image.value, endpoint) {
		if err := p.set(image, endpoints.image[0], endpoints.image[1]); err != nil {
			return nil, err
		}
	}
	if err := p.instance(); err != nil {
		return nil, err
	}
	out := make([]Edit, 0, len(p.order))
	for _, path := range p.order {
		if e := p.files[path]; string(e.Before) != string(e.After) || e.Before == nil {
			out = append(out, *e)
		}
	}
	return out, nil
}

type pointing struct {
	kubelet *Kubelet
	to      string
	files   map[string]*Edit
	order   []string
}

// file returns the edit of a file, with the content of the file.
func (p *pointing) file(path string) (*Edit, error) {
	// Change the file, not a symlink to it.
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if e := p.files[path]; e != nil {
		return e, nil
	}
	e := &Edit{Path: path, Mode: 0o644}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	default:
		e.Mode = fi.Mode().Perm()
		if e.Before, err = os.ReadFile(path); err != nil {
			return nil, err
		}
		if e.Before == nil {
			e.Before = []byte{}
		}
		e.After = slices.Clone(e.Before)
	}
	p.files[path] = e
	p.order = append(p.order, path)
	return e, nil
}

// set changes one setting in the place from which kubelet takes it.
func (p *pointing) set(s setting, flag, field string) error {
	k := p.kubelet
	switch {
	case s.where == onCommandLine:
		return p.replaceFlag(flag)
	case k.fileFlag("config-dir") != "":
		return p.configDir(field)
	case k.fileFlag("config") != "":
		return p.setField(k.fileFlag("config"), field)
	}
	return p.addFlag(flag)
}

func (p *pointing) setField(file, field string) error {
	e, err := p.file(file)
	if err != nil {
		return err
	}
	if e.After, err = yamledit.Set(e.After, p.to, field); err != nil {
		return fmt.Errorf("configuration of kubelet: %s: %w", file, err)
	}
	return nil
}

// configDir writes a file of our own into --config-dir. The file comes after all that have the
// field.
func (p *pointing) configDir(field string) error {
	dir := p.kubelet.fileFlag("config-dir")
	s, err := p.kubelet.setting("", field)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, dropInName)
	if s.where == inDropIn && s.file > path {
		path = filepath.Join(dir, lateName)
		if s.file > path {
			return p.setField(s.file, field)
		}
	}
	e, err := p.file(path)
	if err != nil {
		return err
	}
	if e.After == nil {
		e.After = []byte(dropInHead + dropInKind)
	}
	e.After, err = yamledit.Set(e.After, p.to, field)
	return err
}

// flagValue matches a flag with its value as it stands in a unit or an environment file.
func flagValue(flag string) *regexp.Regexp {
	return regexp.MustCompile(`(--` + regexp.QuoteMeta(flag) + `(?:=|\s+)["']?)([^\s"'\\]+)`)
}

// replaceFlag changes the flag where it is written: environment files in place, the unit by a
// drop-in.
func (p *pointing) replaceFlag(flag string) error {
	re := flagValue(flag)
	with := "${1}" + strings.ReplaceAll(p.to, "$", "$$")
	found := false
	for _, file := range p.kubelet.EnvFiles {
		e, err := p.file(file)
		if err != nil {
			return err
		}
		if e.Before != nil && re.Match(e.After) {
			e.After = re.ReplaceAll(e.After, []byte(with))
			found = true
		}
	}
	for path, e := range p.files { // those that are not there are no business of ours
		if e.Before == nil && e.After == nil {
			delete(p.files, path)
			p.order = slices.DeleteFunc(p.order, func(o string) bool { return o == path })
		}
	}
	unit, err := p.unit()
	if err != nil {
		return err
	}
	var lines []string
	for _, env := range unit.environment {
		if re.MatchString(env) {
			lines = append(lines, "Environment="+re.ReplaceAllString(env, with))
		}
	}
	if re.MatchString(unit.execStart) {
		lines = append(lines, "ExecStart=", "ExecStart="+re.ReplaceAllString(unit.execStart, with))
	}
	if len(lines) > 0 {
		return p.unitDropIn(lines)
	}
	if !found {
		return fmt.Errorf("kubelet was started with --%s, which is neither in its unit %s "+
			"nor in that unit's environment files: set it to %s where your tooling does, restart kubelet, "+
			"and try again",
			flag, p.kubelet.Unit, p.to)
	}
	return nil
}

// addFlag gives the flag to a kubelet that has no configuration file.
func (p *pointing) addFlag(flag string) error {
	unit, err := p.unit()
	if err != nil {
		return err
	}
	if unit.execStart == "" {
		return fmt.Errorf("no ExecStart= in the unit %s", p.kubelet.Unit)
	}
	return p.unitDropIn([]string{"ExecStart=", "ExecStart=" + unit.execStart + " --" + flag + "=" + p.to})
}

// unitDropIn writes our drop-in for kubelet's unit, or adds to it.
func (p *pointing) unitDropIn(lines []string) error {
	e, err := p.file(filepath.Join(p.kubelet.UnitDir, unitDropIn))
	if err != nil {
		return err
	}
	if e.After == nil {
		e.After = []byte(dropInHead + "[Service]\n")
	}
	e.After = append(e.After, strings.Join(lines, "\n")+"\n"...)
	return nil
}

// unit is the part of a unit that is of interest.
type unit struct {
	execStart   string
	environment []string
}

// unit reads the unit's files, as they are to be.
func (p *pointing) unit() (unit, error) {
	var u unit
	files, ours := p.kubelet.UnitFiles, filepath.Join(p.kubelet.UnitDir, unitDropIn)
	if !slices.Contains(files, ours) {
		files = append(slices.Clip(files), ours)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if e := p.files[file]; e != nil {
			b, err = e.After, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return u, err
		}
		section := ""
		for line := range strings.Lines(strings.ReplaceAll(string(b), "\\\n", " ")) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "[") {
				section = line
			}
			key, value, ok := strings.Cut(line, "=")
			if !ok || section != "[Service]" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
				continue
			}
			switch value = strings.TrimSpace(value); strings.TrimSpace(key) {
			case "ExecStart":
				u.execStart = value
			case "Environment":
				if value == "" {
					u.environment = nil
				} else {
					u.environment = append(u.environment, value)
				}
			}
		}
	}
	return u, nil
}

// instance changes the file from which kubeadm would restore the old endpoint at its next upgrade.
func (p *pointing) instance() error {
	if len(p.order) == 0 {
		return nil
	}
	file := filepath.Join(p.kubelet.RootDir(), instanceConfig)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if v, err := yamledit.Get(b, endpoints.runtime[1]); err != nil || v == nil {
		return nil
	}
	return p.setField(file, endpoints.runtime[1])
}
