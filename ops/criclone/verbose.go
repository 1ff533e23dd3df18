// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package criclone

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// DecodeConfig decodes into the CRI message that containerd reports as "config" in the info of a
// verbose status: the Go struct in encoding/json, which has the field names of api.proto and no
// numbers (internal/cri/server/container_status.go ContainerInfo).
//
// It returns an error that names each field that this version of CRI does not have: such a field
// cannot be carried over, and a container without it would be a different one.
func DecodeConfig(info map[string]string, into proto.Message) error {
	var verbose struct {
		Config json.RawMessage `json:"config"`
	}
	err := json.Unmarshal([]byte(info["info"]), &verbose)
	if err != nil || len(verbose.Config) == 0 || string(verbose.Config) == "null" {
		return errors.New("the runtime does not tell its config")
	}
	if err := json.Unmarshal(verbose.Config, into); err != nil {
		return fmt.Errorf("the runtime tells a config that cannot be read (%w)", err)
	}
	if unknown := unknownIn(verbose.Config, into.ProtoReflect().Descriptor(), "config"); len(unknown) > 0 {
		return fmt.Errorf("the runtime tells of %s, which this version of cri-proxy does not know "+
			"and would leave out (upgrade cri-proxy)", strings.Join(unknown, ", "))
	}
	return nil
}

// unknownIn returns the paths of keys in the JSON of a message for which the message has no field.
// Like encoding/json it ignores the case of names.
func unknownIn(raw json.RawMessage, message protoreflect.MessageDescriptor, at string) []string {
	var set map[string]json.RawMessage
	if json.Unmarshal(raw, &set) != nil {
		return nil // not an object: encoding/json has decoded it, or has returned an error
	}
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(set)) {
		value, path := bytes.TrimSpace(set[name]), at+"."+name
		field := fieldNamed(message, name)
		switch {
		case string(value) == "null":
		case field == nil:
			unknown = append(unknown, path)
		case field.IsMap() || field.Message() == nil:
		case field.IsList():
			var items []json.RawMessage
			if json.Unmarshal(value, &items) == nil {
				for i, item := range items {
					unknown = append(unknown, unknownIn(item, field.Message(), fmt.Sprintf("%s[%d]", path, i))...)
				}
			}
		default:
			unknown = append(unknown, unknownIn(value, field.Message(), path)...)
		}
	}
	return unknown
}

func fieldNamed(message protoreflect.MessageDescriptor, name string) protoreflect.FieldDescriptor {
	if f := message.Fields().ByName(protoreflect.Name(name)); f != nil {
		return f
	}
	for i := range message.Fields().Len() {
		if f := message.Fields().Get(i); strings.EqualFold(string(f.Name()), name) {
			return f
		}
	}
	return nil
}
