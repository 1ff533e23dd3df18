// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package opscli

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// maxAuthFile is far above what such files have.
const maxAuthFile = 1 << 20

// authEntry is one registry of a docker config file (docker/cli, cli/config/types.AuthConfig).
type authEntry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"` // base64 of name:password
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// readAuthFile returns the credentials of a docker config file, in the current form or the old one
// (.dockercfg).
func readAuthFile(path string) ([]*opsv1.RegistryCredential, error) {
	if rest, ok := strings.CutPrefix(path, "~/"); ok { // a shell leaves it in --auth-file=~/x
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(home, rest)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxAuthFile {
		return nil, fmt.Errorf("%s has %d bytes, which no docker config file has", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	credentials, err := parseAuth(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return credentials, nil
}

func parseAuth(b []byte) ([]*opsv1.RegistryCredential, error) {
	var file struct {
		Auths       map[string]authEntry `json:"auths"`
		CredsStore  string               `json:"credsStore"`
		CredHelpers map[string]string    `json:"credHelpers"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, notAuth(err)
	}
	entries := file.Auths
	if entries == nil && file.CredsStore == "" && file.CredHelpers == nil {
		if err := json.Unmarshal(b, &entries); err != nil {
			return nil, notAuth(err)
		}
	}
	var out []*opsv1.RegistryCredential
	for match, e := range entries {
		c := &opsv1.RegistryCredential{
			Match: match, Username: e.Username, Password: e.Password,
			IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken,
		}
		if e.Auth != "" {
			raw, err := base64.StdEncoding.DecodeString(e.Auth)
			name, password, ok := strings.Cut(string(raw), ":")
			if err != nil || !ok {
				return nil, fmt.Errorf("the auth of %s is not the base64 form of name:password", match)
			}
			c.Username, c.Password = name, strings.TrimRight(password, "\x00")
		}
		if c.GetUsername() != "" || c.GetIdentityToken() != "" || c.GetRegistryToken() != "" {
			out = append(out, c)
		}
	}
	if len(out) == 0 {
		if file.CredsStore != "" || len(file.CredHelpers) > 0 {
			return nil, errors.New("it names a credential helper and has no credentials itself: " +
				"make a file with docker --config DIR login REGISTRY, without credsStore and credHelpers")
		}
		return nil, errors.New("there are no credentials in it")
	}
	slices.SortFunc(out, func(a, b *opsv1.RegistryCredential) int {
		return strings.Compare(a.GetMatch(), b.GetMatch())
	})
	return out, nil
}

// notAuth replaces a JSON error, which may quote a secret.
func notAuth(err error) error {
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		return fmt.Errorf("not JSON, at byte %d", syntax.Offset)
	}
	return errors.New("not a docker config file: want {\"auths\": {\"registry.example\": {\"auth\": \"...\"}}}")
}
