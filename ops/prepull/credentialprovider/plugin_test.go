// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package credentialprovider

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kubelets is kubelet's environment.
func kubelets() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HTTPS_PROXY=http://kubelets-proxy:3128", "WHO=kubelet"}
}

// install writes a configuration and its plugins, shell scripts by name, and loads it.
func install(t *testing.T, config string, scripts map[string]string) (*Plugins, *bytes.Buffer, error) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\ncd "+dir+"\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var words bytes.Buffer
	log := logrus.New()
	log.SetOutput(&words)
	p, err := Load(path, dir, kubelets, log)
	return p, &words, err
}

const head = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"

func entry(name, match, keep string) string {
	return fmt.Sprintf("- {name: %s, matchImages: [%q], defaultCacheDuration: %s, apiVersion: "+
		"credentialprovider.kubelet.k8s.io/v1, args: [get, creds], env: [{name: WHO, value: me}]}\n", name, match, keep)
}

// answering is a plugin that counts its calls, and gives the image, its arguments and environment
// as the password.
func answering(more string) string {
	return `in=$(cat); echo x >> calls
image=${in##*\"image\":\"}; image=${image%%\"*}
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",` + more + `"auth":{"*.cloud.io":{"username":"u","password":"%s"}}}' "$image $* $WHO $HTTPS_PROXY$OURS"
`
}

func get(p *Plugins, image string) string {
	var out []string
	for _, c := range p.Credentials(context.Background(), image) {
		out = append(out, c.GetMatch()+"="+c.GetUsername()+":"+c.GetPassword())
	}
	return strings.Join(out, ",")
}

func TestCredentials(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://own-proxy")
	t.Setenv("OURS", "not for plugins")
	for keyType, calls := range map[string]int{"Image": 3, "Registry": 2, "Global": 1} {
		t.Run(keyType, func(t *testing.T) {
			p, words, err := install(t, head+entry("cloud", "*.cloud.io", "1h"),
				map[string]string{"cloud": answering(`"cacheKeyType":"` + keyType + `",`)})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := get(p, "a.cloud.io/x"),
				"*.cloud.io=u:a.cloud.io/x get creds me http://kubelets-proxy:3128"; got != want {
				t.Errorf("got %q, want %q; %s", got, want, words)
			}
			for _, image := range []string{"a.cloud.io/x", "a.cloud.io/y", "b.cloud.io/x", "b.cloud.io/x"} {
				if get(p, image) == "" {
					t.Errorf("nothing for %s: %s", image, words)
				}
			}
			if got := get(p, "other.io/x"); got != "" {
				t.Errorf("asked for an image that is not its own: %s", got)
			}
			b, _ := os.ReadFile(filepath.Join(filepath.Dir(p.plugins[0].bin), "calls"))
			if n := bytes.Count(b, []byte("x")); n != calls {
				t.Errorf("%d calls, want %d", n, calls)
			}
		})
	}
}

func TestHowLongAnswersAreKept(t *testing.T) {
	for name, tt := range map[string]struct {
		more, keep string
		after      time.Duration
		calls      int
	}{
		"default":         {"", "1h", 59 * time.Minute, 1},
		"default over":    {"", "1h", 61 * time.Minute, 2},
		"not kept":        {"", "0s", 0, 2},
		"own":             {`"cacheDuration":"5m0s",`, "1h", 6 * time.Minute, 2},
		"own, longer":     {`"cacheDuration":"5h0m0s",`, "1h", 4 * time.Hour, 1},
		"own is not kept": {`"cacheDuration":"0s",`, "1h", 0, 2},
	} {
		t.Run(name, func(t *testing.T) {
			p, _, err := install(t, head+entry("cloud", "*.cloud.io", tt.keep),
				map[string]string{"cloud": answering(tt.more + `"cacheKeyType":"Image",`)})
			if err != nil {
				t.Fatal(err)
			}
			now := time.Now()
			for _, at := range []time.Time{now, now.Add(tt.after)} {
				if found, err := p.plugins[0].credentials(t.Context(), "a.cloud.io/x", at); err != nil ||
					len(found) != 1 {
					t.Fatal(found, err)
				}
			}
			b, _ := os.ReadFile(filepath.Join(filepath.Dir(p.plugins[0].bin), "calls"))
			if n := bytes.Count(b, []byte("x")); n != tt.calls {
				t.Errorf("%d calls, want %d", n, tt.calls)
			}
		})
	}
}

// TestFailingPlugins have no credentials, keep nobody else from having some, and nothing of what
// they say is logged.
func TestFailingPlugins(t *testing.T) {
	for name, script := range map[string]string{
		"exit code": "echo secret >&2; exit 3",
		"not JSON":  "echo secret",
		"another " +
			"kind": `echo '{"kind":"x","apiVersion":"credentialprovider.kubelet.k8s.io/v1","auth":{"a":{"password":"secret"}}}'`,
		"version":     `echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1","cacheKeyType":"Image","auth":{"a":{"password":"secret"}}}'`,
		"no key type": strings.ReplaceAll(answering(""), "$image", "secret"),
		"bad duration": strings.ReplaceAll(answering(`"cacheKeyType":"Image","cacheDuration":"secret",`), "$image",
			"secret"),
		"another shape": `echo '{"auth":["secret"]}'`,
		"endless":       "yes secret",
	} {
		t.Run(name, func(t *testing.T) {
			p, words, err := install(t, head+entry("bad", "*.cloud.io", "1h")+entry("good", "*.cloud.io", "1h"),
				map[string]string{"bad": script, "good": answering(`"cacheKeyType":"Image",`)})
			if err != nil {
				t.Fatal(err)
			}
			if got := get(p, "a.cloud.io/x"); !strings.HasPrefix(got, "*.cloud.io=u:a.cloud.io/x") {
				t.Errorf("got %q", got)
			}
			if !strings.Contains(words.String(), "no credentials from the plugin") ||
				!strings.Contains(words.String(), "provider=bad") || strings.Contains(words.String(), "secret") {
				t.Errorf("logged: %s", words)
			}
		})
	}
}

func TestHangingPlugin(t *testing.T) {
	p, _, err := install(t, head+entry("cloud", "*.cloud.io", "1h"), map[string]string{"cloud": "exec sleep 1000"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	if found := p.Credentials(ctx, "a.cloud.io/x"); found != nil || time.Since(began) > 2*time.Minute {
		t.Errorf("%v in %s", found, time.Since(began))
	}
}

func TestNoPlugins(t *testing.T) {
	var p *Plugins
	if p.Credentials(t.Context(), "a.io/x") != nil {
		t.Error("credentials from nowhere")
	}
}

func TestConfig(t *testing.T) {
	good := map[string]string{"cloud": "exit 0"}
	for name, tt := range map[string]struct{ config, want string }{
		"no YAML": {"\t", "config.yaml"},
		"another kind": {"apiVersion: v1\nkind: Config\n",
			`want apiVersion kubelet.config.k8s.io/v1 and kind CredentialProviderConfig, got "v1" and "Config"`},
		"empty":          {head, "no providers in it"},
		"no such plugin": {head + entry("none", "a.io", "1h"), `provider "none"`},
		"slash":          {head + entry("../cloud", "a.io", "1h"), "name: want that of a program"},
		"twice":          {head + entry("cloud", "a.io", "1h") + entry("cloud", "b.io", "1h"), "is there twice"},
		"negative":       {head + entry("cloud", "a.io", "-1h"), "negative"},
		"no duration": {head +
			"- {name: cloud, matchImages: [a.io], apiVersion: credentialprovider.kubelet.k8s.io/v1}\n",
			"defaultCacheDuration: missing"},
		"no match": {head +
			"- {name: cloud, defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}\n",
			"matchImages: want at least one"},
		"bad match": {head + entry("cloud", "a%zz.io", "1h"), "matchImages"},
		"version": {head + "- {name: cloud, matchImages: [a.io], defaultCacheDuration: 1h, apiVersion: v1}\n",
			`apiVersion: "v1"; want one of`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := install(t, tt.config, good); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	t.Run("JSON", func(t *testing.T) {
		if p, _, err := install(t,
			`{"apiVersion":"kubelet.config.k8s.io/v1beta1","kind":"CredentialProviderConfig","providers":[{"name":"cloud","matchImages":["a.io"],"defaultCacheDuration":"12h0m0s","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1"}]}`, good); err != nil || len(p.plugins) != 1 {
			t.Error(err)
		}
	})
	t.Run("service account tokens", func(t *testing.T) {
		p, words, err := install(t, head+"- {name: cloud, matchImages: [a.io], defaultCacheDuration: 1h, apiVersion: "+
			"credentialprovider.kubelet.k8s.io/v1, tokenAttributes: {requireServiceAccount: true}}\n", good)
		if err != nil || len(p.plugins) != 0 || !strings.Contains(words.String(), "service accounts") {
			t.Errorf("%v %s", err, words)
		}
	})
	t.Run("directory", func(t *testing.T) {
		dir := t.TempDir()
		for name, text := range map[string]string{"cloud": "#!/bin/sh\n", "a.yaml": head +
			entry("cloud", "a.io", "1h"), "README": "no"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if p, err := Load(dir, dir, kubelets, logrus.New()); err != nil || len(p.plugins) != 1 {
			t.Error(err)
		}
		if _, err := Load(t.TempDir(), dir, kubelets, logrus.New()); err == nil {
			t.Error("an empty directory is accepted")
		}
		if _, err := Load(filepath.Join(dir, "none"), dir, kubelets, logrus.New()); err == nil {
			t.Error("no file is accepted")
		}
	})
}
