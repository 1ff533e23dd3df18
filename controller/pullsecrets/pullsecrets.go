// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pullsecrets

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/mirrorpod"
)

// maxCredentials is the most a node takes. More for one image are left out from the end of the order in which they are tried.
const maxCredentials = 256

// DefaultAccount is the ServiceAccount whose imagePullSecrets pods get that name no other.
const DefaultAccount = "default"

// Keyring is what came of reading secrets.
type Keyring struct {
	// credentials are all that the secrets have, in the order in which kubelet tries them. They leave through For only.
	credentials []*opsv1.RegistryCredential
	// Asked says that there are secrets to read; Wrong, which of them cannot be used or have nothing to use, and why. Neither holds a
	// secret.
	Asked bool
	Wrong []string
}

// UnreadableError says that the API server did not hand out a secret for now.
type UnreadableError struct{ Err error }

// Error says what could not be read.
func (e *UnreadableError) Error() string { return e.Err.Error() }

// Unwrap returns the API server's error.
func (e *UnreadableError) Unwrap() error { return e.Err }

// Read reads the named secrets of a namespace, which the user gave in a field called by, and those of a ServiceAccount. What
// is missing or malformed is left out and named; the error, an *UnreadableError, is one that may pass.
func Read(ctx context.Context, from client.Reader, namespace, serviceAccount string, names []string, by string) (*Keyring, error) {
	k := &Keyring{}
	var account corev1.ServiceAccount
	err := from.Get(ctx, client.ObjectKey{Namespace: namespace, Name: serviceAccount}, &account)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, &UnreadableError{fmt.Errorf("reading ServiceAccount %s/%s: %w", namespace, serviceAccount, err)}
	}
	type source struct{ name, by string }
	var sources []source
	for _, name := range names {
		sources = append(sources, source{name, by})
	}
	for _, ref := range account.ImagePullSecrets {
		if !slices.Contains(names, ref.Name) {
			sources = append(sources, source{ref.Name, "imagePullSecrets of ServiceAccount " + serviceAccount})
		}
	}
	for _, s := range sources {
		k.Asked = true
		var secret corev1.Secret
		err := from.Get(ctx, client.ObjectKey{Namespace: namespace, Name: s.name}, &secret)
		switch {
		case apierrors.IsNotFound(err):
			k.Wrong = append(k.Wrong, fmt.Sprintf("secret %s of %s does not exist in namespace %s", s.name, s.by, namespace))
			continue
		case err != nil:
			return nil, &UnreadableError{fmt.Errorf("reading secret %s/%s: %w", namespace, s.name, err)}
		}
		credentials, err := credentialsOf(&secret)
		if err != nil {
			k.Wrong = append(k.Wrong, fmt.Sprintf("secret %s of %s cannot be used: %s", s.name, s.by, err))
			continue
		}
		if !slices.ContainsFunc(credentials, usable) {
			k.Wrong = append(k.Wrong, fmt.Sprintf("secret %s of %s has no credentials: %s", s.name, s.by, whyEmpty(&secret)))
		}
		// Empty ones too: kubelet asks the registry without for each.
		k.credentials = append(k.credentials, credentials...)
	}
	// Kubelet tries the longest match of a name first, and equal ones in the order in which they came
	// (pkg/credentialprovider/keyring.go).
	slices.SortStableFunc(k.credentials, func(a, b *opsv1.RegistryCredential) int { return strings.Compare(b.GetMatch(), a.GetMatch()) })
	return k, nil
}

// For returns those of the credentials that kubelet would try for one of the images. A node gets no others: it may be told of one image
// of a namespace, and need not know how to get all of them.
func (k *Keyring) For(images ...string) []*opsv1.RegistryCredential {
	if k == nil {
		return nil
	}
	match := map[*opsv1.RegistryCredential]bool{}
	for _, image := range images {
		for _, c := range keyring.ForImage(k.credentials, image) {
			match[c] = true
		}
	}
	var out []*opsv1.RegistryCredential
	for _, c := range k.credentials {
		if match[c] && len(out) < maxCredentials {
			out = append(out, c)
		}
	}
	return out
}

// Has reports whether there are credentials for the image.
func (k *Keyring) Has(image string) bool {
	return k != nil && slices.ContainsFunc(keyring.ForImage(k.credentials, image), usable)
}

func usable(c *opsv1.RegistryCredential) bool {
	return c.GetUsername() != "" || c.GetPassword() != "" || c.GetIdentityToken() != "" || c.GetRegistryToken() != ""
}

// whyEmpty says why a secret that can be read has no credentials. docker keeps them elsewhere when it is told to, and leaves the entries
// empty; kubelet does not read what says so either (credentialprovider.DockerConfigJSON).
func whyEmpty(secret *corev1.Secret) string {
	var config struct {
		Store   string            `json:"credsStore"`
		Helpers map[string]string `json:"credHelpers"`
	}
	if json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config) == nil && (config.Store != "" || len(config.Helpers) > 0) {
		return "it names only a credential store or helper (credsStore, credHelpers) of the machine that it was made on, which no node can ask; " +
			"make it with kubectl create secret docker-registry"
	}
	return "it names no registry, or none with a name, password or token"
}

// Pulled are the images that a node may have to pull for a container: its own, and those of its volumes.
func Pulled(image string, policy opsv1.PullPolicy, env *opsv1.Environment) []string {
	var images []string
	if policy != opsv1.PullPolicy_PULL_POLICY_NEVER {
		images = append(images, image)
	}
	for _, v := range env.GetImageVolumes() {
		if v.GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_NEVER {
			images = append(images, v.GetReference())
		}
	}
	return images
}

// Of reads the credentials with which kubelet would pull images for a pod; none without images, and none for a pod that a node has made.
//
// Errors: an *[UnreadableError], which may pass.
func Of(ctx context.Context, from client.Reader, pod *corev1.Pod, images []string) ([]*opsv1.RegistryCredential, error) {
	if len(images) == 0 || mirrorpod.Is(pod) {
		return nil, nil
	}
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = DefaultAccount
	}
	var names []string
	for _, s := range pod.Spec.ImagePullSecrets {
		names = append(names, s.Name)
	}
	k, err := Read(ctx, from, pod.Namespace, account, names, "imagePullSecrets")
	if err != nil {
		return nil, err
	}
	return k.For(images...), nil
}

// dockerEntry is one registry of a docker config.
type dockerEntry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// credentialsOf reads a secret. No part of it gets into the error.
func credentialsOf(secret *corev1.Secret) ([]*opsv1.RegistryCredential, error) {
	var entries map[string]dockerEntry
	switch secret.Type {
	case corev1.SecretTypeDockerConfigJson:
		var config struct {
			Auths map[string]dockerEntry `json:"auths"`
		}
		if json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config) != nil {
			return nil, fmt.Errorf("its %s is no docker config.json", corev1.DockerConfigJsonKey)
		}
		entries = config.Auths
	case corev1.SecretTypeDockercfg:
		if json.Unmarshal(secret.Data[corev1.DockerConfigKey], &entries) != nil {
			return nil, fmt.Errorf("its %s is no docker config", corev1.DockerConfigKey)
		}
	default:
		return nil, fmt.Errorf("its type is %q, not %s or %s", secret.Type, corev1.SecretTypeDockerConfigJson, corev1.SecretTypeDockercfg)
	}
	var credentials []*opsv1.RegistryCredential
	for key, e := range entries {
		c := &opsv1.RegistryCredential{
			Match: registryKey(key), Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken,
		}
		if e.Auth != "" {
			var err error
			if c.Username, c.Password, err = decodeAuth(e.Auth); err != nil {
				return nil, errors.New("the auth of an entry is no base64 of NAME:PASSWORD")
			}
		}
		credentials = append(credentials, c)
	}
	// The same order each time.
	slices.SortFunc(credentials, func(a, b *opsv1.RegistryCredential) int { return strings.Compare(b.GetMatch(), a.GetMatch()) })
	return credentials, nil
}

func decodeAuth(auth string) (user, password string, err error) {
	// Some tools leave the padding out.
	b, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(auth, "="))
	if err != nil {
		return "", "", err
	}
	user, password, ok := strings.Cut(string(b), ":")
	if !ok {
		return "", "", errors.New("no colon")
	}
	return user, strings.TrimRight(password, "\x00"), nil
}

// registryKey takes off an entry's key what docker leaves on it and does not count: the scheme and the API version.
func registryKey(key string) string {
	key = strings.TrimPrefix(strings.TrimPrefix(key, "https://"), "http://")
	host, path, _ := strings.Cut(key, "/")
	path = strings.Trim(path, "/")
	for _, version := range []string{"v1", "v2"} {
		if path == version {
			path = ""
		} else if rest, ok := strings.CutPrefix(path, version+"/"); ok {
			path = rest
		}
	}
	if path == "" {
		return host
	}
	return host + "/" + path
}
