// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package deploy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/api/identity"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/ops/enrol"
)

// ownNamespace is the controller's.
const ownNamespace = "cri-proxy-system"

// testIdentity: the node has enrolled with kubelet's real credentials and has been commanded, else
// the steps before had failed.
func testIdentity(t *testing.T) {
	proxy := bed.Pid("cri-proxy")
	first := certificate(t)
	eventually(t, "the node says what its certificate says", func() (string, bool) { // it is renewed all the time
		i, c := nodeIdentity(t), certificate(t)
		return fmt.Sprintf("%v, and its certificate is good until %s", i, c.NotAfter),
			i.GetSource() == "controller" && i.GetExpireTime().AsTime().Unix() == c.NotAfter.Unix() &&
				i.GetProblem() == ""
	})
	for file, mode := range map[string]fs.FileMode{enrol.CertFile(bed.StateDir): 0o600,
		enrol.Directory(bed.StateDir): 0o700 | fs.ModeDir} {
		if fi, err := os.Stat(file); err != nil || fi.Mode() != mode {
			t.Errorf("%s: %v %v", file, fi.Mode(), err)
		}
	}

	t.Run("requests that are denied", testDeniedRequests)
	t.Run("what kubelet's credentials read", testKubeletReads)
	t.Run("a stolen node certificate commands nobody", testStolenCertificate)
	t.Run("a removed node", testRemovedNode)

	t.Run("rotation of the certificate and of the CA", func(t *testing.T) {
		kubectl(t, "-n", ownNamespace, "annotate", "secret", "cri-proxy-ca", "cri-proxy.io/rotate=now")
		eventually(t, "both CAs are trusted", func() (string, bool) {
			text, _ := os.ReadFile(enrol.CAFile(bed.StateDir))
			return string(text), strings.Count(string(text), "BEGIN") == 2
		})
		eventually(t, "the node has a certificate of the next CA", func() (string, bool) {
			c := certificate(t)
			return c.Issuer.String(), c.Issuer.CommonName != first.Issuer.CommonName
		})
		commanded(t, "rotated")
	})
	t.Run("the CA is deleted", func(t *testing.T) {
		before := certificate(t)
		kubectl(t, "-n", ownNamespace, "delete", "secret", "cri-proxy-ca")
		eventually(t, "the node has enrolled anew", func() (string, bool) {
			c := certificate(t)
			return c.Issuer.String(), c.Issuer.CommonName != before.Issuer.CommonName
		})
		commanded(t, "replaced")
	})
	if now := bed.Pid("cri-proxy"); now != proxy {
		t.Errorf("the proxy was process %d and is %d", proxy, now)
	}
}

// commanded has the node restart a container by a request.
func commanded(t *testing.T, name string) {
	t.Helper()
	apply(t, fmt.Sprintf(`
apiVersion: apps.kruise.io/v1alpha1
kind: ContainerRecreateRequest
metadata: {name: %s, namespace: first}
spec: {podName: shop-0, containers: [{name: app}]}
`, name))
	eventually(t, "the container is restarted", func() (string, bool) {
		out := kubectl(t, "-n", "first", "get", "containerrecreaterequest", name, "-o",
			"jsonpath={.status.phase} {.status.containerRecreateStates[*].phase} {.status.message}")
		return out, strings.HasPrefix(out, "Completed Succeeded")
	})
}

// certificate is the node's, as it lies on its disk.
func certificate(t *testing.T) *x509.Certificate {
	t.Helper()
	return pair(t).Leaf
}

// pair is the node's certificate and key, which are one file that is replaced now and then: both
// are of one reading.
func pair(t *testing.T) tls.Certificate {
	t.Helper()
	text, err := os.ReadFile(enrol.CertFile(bed.StateDir))
	must(t, err)
	p, err := tls.X509KeyPair(text, text)
	must(t, err)
	return p
}

func nodeIdentity(t *testing.T) *opsv1.Identity {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+bed.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	info, err := opsv1.NewOpsClient(conn).NodeInfo(t.Context(), &opsv1.NodeInfoRequest{})
	must(t, err)
	return info.GetIdentity()
}

// as is a client with a kubeconfig's credentials.
func as(t *testing.T, kubeconfig string) client.Client {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	must(t, err)
	c, err := client.New(config, client.Options{Scheme: api.Scheme()})
	must(t, err)
	return c
}

// ask creates a request for a node's certificate and returns it when it has been decided on.
func ask(
	t *testing.T, c client.Client, name string, usages ...certificatesv1.KeyUsage,
) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, key)
	must(t, err)
	if len(usages) == 0 {
		usages = []certificatesv1.KeyUsage{"digital signature", "server auth"}
	}
	r := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: identity.SignerName, Usages: usages,
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		},
	}
	must(t, c.Create(t.Context(), r))
	eventually(t, "the request is decided on", func() (string, bool) {
		must(t, api.Get(t.Context(), client.ObjectKeyFromObject(r), r))
		return fmt.Sprint(r.Status.Conditions), len(r.Status.Certificate) > 0 ||
			len(r.Status.Conditions) > 0 && r.Status.Conditions[0].Type != certificatesv1.CertificateApproved
	})
	return r
}

func testDeniedRequests(t *testing.T) {
	kubelet := as(t, bed.KubeletKubeconfig())
	must(t, api.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "another-node"}}))
	defer kubectl(t, "delete", "node", "another-node")
	for _, tt := range []struct {
		name   string
		who    client.Client
		cn     string
		usages []certificatesv1.KeyUsage
		reason string
	}{
		{"in another node's name", kubelet, "another-node", nil, "WrongName"},
		{"in the controller's name", kubelet, identity.ControllerName, nil, "WrongName"},
		{"for a client", kubelet, bed.NodeName, []certificatesv1.KeyUsage{"digital signature", "client auth"},
			"WrongUsages"},
		{"by who is no node", api, bed.NodeName, nil, "NotANode"},
	} {
		r := ask(t, tt.who, tt.cn, tt.usages...)
		c := r.Status.Conditions[0]
		if c.Type != certificatesv1.CertificateDenied || c.Reason != tt.reason || len(r.Status.Certificate) > 0 {
			t.Errorf("%s: %+v", tt.name, r.Status)
		}
		eventually(t, "there is an Event", func() (string, bool) {
			var list eventsv1.EventList
			must(t, api.List(t.Context(), &list, client.InNamespace("default")))
			for _, e := range list.Items {
				if e.Regarding.Name == r.Name && e.Reason == tt.reason && e.Note == c.Message {
					return "", true
				}
			}
			return fmt.Sprint(len(list.Items), " others"), false
		})
	}
	// What the controller's own permissions keep it from, whatever it wants.
	controller := &certificatesv1.CertificateSigningRequest{}
	must(t, api.Get(t.Context(), client.ObjectKey{Name: ask(t, kubelet, bed.NodeName).Name}, controller))
	if len(controller.Status.Certificate) == 0 {
		t.Errorf("a good one is not signed: %+v", controller.Status)
	}
}

func testKubeletReads(t *testing.T) {
	kubelet := as(t, bed.KubeletKubeconfig())
	key := func(name string) client.ObjectKey { return client.ObjectKey{Namespace: ownNamespace, Name: name} }
	must(t, kubelet.Get(t.Context(), key(identity.BundleName), &corev1.ConfigMap{}))
	for what, err := range map[string]error{
		"the CA's key":     kubelet.Get(t.Context(), key("cri-proxy-ca"), &corev1.Secret{}),
		"other ConfigMaps": kubelet.Get(t.Context(), key("another"), &corev1.ConfigMap{}),
		"all ConfigMaps":   kubelet.List(t.Context(), &corev1.ConfigMapList{}, client.InNamespace(ownNamespace)),
		"change of the CAs": kubelet.Update(t.Context(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ownNamespace, Name: identity.BundleName}}),
	} {
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func testStolenCertificate(t *testing.T) {
	text, err := os.ReadFile(enrol.CAFile(bed.StateDir))
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	conn, err := grpc.NewClient(bed.OpsAddress,
		grpc.WithTransportCredentials(
			credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair(t)}, RootCAs: roots,
				ServerName: bed.NodeName})))
	must(t, err)
	defer conn.Close()
	if _, err := opsv1.NewOpsClient(conn).
		NodeInfo(t.Context(), &opsv1.NodeInfoRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("let in: %v", err)
	}
	eventually(t, "the refusal is logged", func() (string, bool) {
		text, err := os.ReadFile(bed.LogFile("cri-proxy"))
		must(t, err)
		return "", strings.Contains(string(text), "ops client denied") &&
			strings.Contains(string(text), "incompatible key usage")
	})
}

// testRemovedNode: a node whose Node is gone gets no certificate any more, with credentials that
// are as good as before.
func testRemovedNode(t *testing.T) {
	must(t, api.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "ghost"}}))
	kubeconfig, err := bed.NewKubeconfig("ghost", "system:node:ghost", "system:nodes")
	must(t, err)
	ghost := as(t, kubeconfig)
	if r := ask(t, ghost, "ghost"); len(r.Status.Certificate) == 0 {
		t.Fatalf("%+v", r.Status)
	}
	kubectl(t, "delete", "node", "ghost")
	if r := ask(t, ghost, "ghost"); len(r.Status.Certificate) > 0 || r.Status.Conditions[0].Reason != "NoSuchNode" {
		t.Errorf("%+v", r.Status)
	}
}
