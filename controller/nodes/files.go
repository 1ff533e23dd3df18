// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package nodes

import (
	"errors"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/credentials"

	"github.com/cri-proxy/cri-proxy/internal/mtls"
)

// Files are the PEM files of the controller's identity towards nodes. The client reads them again
// when they change, so certificates can be renewed in place.
type Files struct {
	// Cert and Key are the controller's client certificate and its key.
	Cert, Key string
	// CA holds the certificates that node certificates must chain to.
	CA string
}

// credentials reads the files once, so that a bad file is an error at start. The name that a
// server's certificate must carry is the authority of the connection.
func (f Files) credentials(log logrus.FieldLogger) (credentials.TransportCredentials, error) {
	if f.Cert == "" || f.Key == "" || f.CA == "" {
		return nil, errors.New("the certificate, the key and the CA for talking to nodes must all be given: " +
			"nodes accept mutual TLS only")
	}
	return mtls.NewClient(mtls.ClientOptions{CertFile: f.Cert, KeyFile: f.Key, ServerCAFile: f.CA, Log: log})
}
