// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli_test

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cri-proxy/cri-proxy/internal/opscli"
)

func TestByteRate(t *testing.T) {
	for s, want := range map[string]int64{
		"1": 1, "1048576": mib, "20MiB/s": 20 * mib, "20MiB": 20 * mib, "20Mi": 20 * mib, "20 MiB/s": 20 * mib,
		"20MB/s": 20e6, "20M": 20e6,
		"1.5GiB/s": 3 << 29, "500kB/s": 500e3, "500K": 500e3, "512KiB/s": 512 << 10, "10B/s": 10,
	} {
		var r opscli.ByteRate
		if err := r.Set(s); err != nil || int64(r) != want {
			t.Errorf("%s: %d, %v", s, r, err)
		}
	}
	for _, s := range []string{"", "0", "-1", "MiB", "1TiB", "1e9", "1MiB/m", "1..5M", "0.1", "99999999GiB", "1 0"} {
		if err := new(opscli.ByteRate).Set(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
	r := opscli.ByteRate(20 * mib)
	if r.String() != "20.0 MiB/s" {
		t.Error(r.String())
	}
}

func TestParseAuth(t *testing.T) {
	auth := base64.StdEncoding.EncodeToString([]byte("user:pass"))
	for _, tt := range []struct{ name, file, want string }{
		{"config.json", `{"auths":{"b.io":{"auth":"` + auth +
			`"},"a.io":{"username":"u","password":"p","email":"x"},"none.io":{}},"HttpHeaders":{"a":"b"}}`,
			"a.io=u:p b.io=user:pass"},
		{"dockercfg", `{"https://index.docker.io/v1/":{"auth":"` + auth + `"}}`,
			"https://index.docker.io/v1/=user:pass"},
		{"tokens", `{"auths":{"a.io":{"auth":"` + auth + `","identitytoken":"t"}}}`, "a.io=user:pass/t"},
		{"helper beside", `{"auths":{"a.io":{"auth":"` + auth + `"}},"credsStore":"desktop"}`, "a.io=user:pass"},
		{"helper only", `{"auths":{"a.io":{}},"credsStore":"desktop"}`, "error: names a credential helper"},
		{"helpers only", `{"credHelpers":{"a.io":"gcloud"}}`, "error: names a credential helper"},
		{"empty", `{}`, "error: no credentials in it"},
		{"not base64", `{"auths":{"a.io":{"auth":"secret secret"}}}`, "error: the auth of a.io is not"},
		{"not JSON", `secret`, "error: not JSON, at byte 1"},
		{"another file", `{"apiVersion":"secret"}`, "error: not a docker config file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := opscli.ParseAuth([]byte(tt.file))
			if want, ok := strings.CutPrefix(tt.want, "error: "); ok {
				if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
					t.Errorf("got %v, want %s", err, want)
				}
				return
			}
			var text []string
			for _, c := range got {
				s := c.GetMatch() + "=" + c.GetUsername() + ":" + c.GetPassword()
				if c.GetIdentityToken() != "" {
					s += "/" + c.GetIdentityToken()
				}
				text = append(text, s)
			}
			if joined := strings.Join(text, " "); err != nil || joined != tt.want {
				t.Errorf("%v, %s", err, joined)
			}
		})
	}
	t.Run("home", func(t *testing.T) {
		t.Setenv("HOME", t.TempDir())
		if err := os.WriteFile(filepath.Join(os.Getenv("HOME"), "c.json"), []byte(`{"a":{"username":"u"}}`),
			0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := opscli.ReadAuthFile("~/c.json"); err != nil || len(c) != 1 {
			t.Errorf("%v, %v", c, err)
		}
	})
}

func FuzzParseAuth(f *testing.F) {
	f.Add([]byte(`{"auths":{"a.io":{"auth":"dTpw"}}}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = opscli.ParseAuth(b) })
}

func TestShellWord(t *testing.T) {
	for word, want := range map[string]string{"app=r.io:5000/a/b@sha256:0": "app=r.io:5000/a/b@sha256:0",
		"a b": "'a b'", "it's": `'it'\''s'`, "$(x)": "'$(x)'", "": "''"} {
		if got := opscli.ShellWord(word); got != want {
			t.Errorf("%q: %s, want %s", word, got, want)
		}
	}
}
