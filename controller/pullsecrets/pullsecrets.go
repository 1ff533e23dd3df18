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

// maxCredentials is the most credentials that a node accepts. If an image has more, the last ones
// in the order of use are left out.
const maxCredentials = 256

// DefaultAccount is the ServiceAccount of pods that name no other: they get its imagePullSecrets.
const DefaultAccount = "default"

// Keyring holds the credentials of secrets, and what is wrong with the secrets.
type Keyring struct {
	// credentials are all credentials of the secrets, in the order in which kubelet tries them.
	// Only For hands them out.
	credentials []*opsv1.RegistryCredential
	// Asked says that there are secrets to read. Wrong says which of them cannot be used, or are
	// empty, and why. Neither holds a secret.
	Asked bool
	Wrong []string
}

// UnreadableError says that the API server does not hand out a secret at the moment.
type UnreadableError struct{ Err error }

// Error says what could not be read.
func (e *UnreadableError) Error() string { return e.Err.Error() }

// Unwrap returns the API server's error.
func (e *UnreadableError) Unwrap() error { return e.Err }

// Read reads the named secrets of a namespace, which the user listed in a field called by, and
// those of a ServiceAccount. It leaves out missing and malformed secrets, and names them in the
// Keyring. The error, an *UnreadableError, may go away by itself.
func Read(
	ctx context.Context, from client.Reader, namespace, serviceAccount string, names []string, by string,
) (*Keyring, error) {
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
			k.Wrong = append(k.Wrong, fmt.Sprintf("secret %s of %s does not exist in namespace %s", s.name, s.by,
				namespace))
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
			k.Wrong = append(k.Wrong, fmt.Sprintf("secret %s of %s has no credentials: %s", s.name, s.by,
				whyEmpty(&secret)))
		}
		// Keep empty credentials, too: kubelet asks the registry without credentials for each of
		// them.
		k.credentials = append(k.credentials, credentials...)
	}
	// kubelet tries the longest match of a name first, and equal ones in the order in which they
	// came (pkg/credentialprovider/keyring.go).
	slices.SortStableFunc(k.credentials,
		func(a, b *opsv1.RegistryCredential) int { return strings.Compare(b.GetMatch(), a.GetMatch()) })
	return k, nil
}

// For returns the credentials that kubelet would try for one of the images. A node gets no others:
// it may learn of one image of a namespace, and need not know how to get all of them.
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

// whyEmpty says why a readable secret has no credentials. docker can keep credentials elsewhere,
// and then leaves the entries empty; kubelet does not read where, either
// (credentialprovider.DockerConfigJSON).
func whyEmpty(secret *corev1.Secret) string {
	var config struct {
		Store   string            `json:"credsStore"`
		Helpers map[string]string `json:"credHelpers"`
	}
	if json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config) == nil &&
		(config.Store != "" || len(config.Helpers) > 0) {
		return "it names only a credential store or helper (credsStore, credHelpers) of the machine that it " +
			"was made on, " +
			"which no node can ask; " +
			"make it with kubectl create secret docker-registry"
	}
	return "it names no registry, or none with a name, password or token"
}

// Pulled returns the images that a node may have to pull for a container: its own, and those of its
// volumes.
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

// Of reads the credentials with which kubelet would pull images for a pod. It returns none if there
// are no images, and none for a pod that a node has created.
//
// Errors: an *[UnreadableError], which may go away by itself.
func Of(
	ctx context.Context, from client.Reader, pod *corev1.Pod, images []string,
) ([]*opsv1.RegistryCredential, error) {
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

// dockerEntry is the entry of one registry in a docker config.
type dockerEntry struct {
	Username      string `json:"username"`
	Password      string `json:"password"`
	Auth          string `json:"auth"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// credentialsOf reads a secret. The error contains no part of the secret.
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
		return nil, fmt.Errorf("its type is %q, not %s or %s", secret.Type, corev1.SecretTypeDockerConfigJson,
			corev1.SecretTypeDockercfg)
	}
	var credentials []*opsv1.RegistryCredential
	for key, e := range entries {
		c := &opsv1.RegistryCredential{
			Match: registryKey(key), Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken,
			RegistryToken: e.RegistryToken,
		}
		if e.Auth != "" {
			var err error
			if c.Username, c.Password, err = decodeAuth(e.Auth); err != nil {
				return nil, errors.New("the auth of an entry is no base64 of NAME:PASSWORD")
			}
		}
		credentials = append(credentials, c)
	}
	// Keep the same order each time.
	slices.SortFunc(credentials,
		func(a, b *opsv1.RegistryCredential) int { return strings.Compare(b.GetMatch(), a.GetMatch()) })
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

// registryKey removes from the key of an entry what docker leaves on it and what does not count:
// the scheme and the API version.
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
