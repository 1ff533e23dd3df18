// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package logadapter lets what controller-runtime and client-go log come out of logrus.
package logadapter

import (
	"fmt"

	"github.com/go-logr/logr"
	"github.com/sirupsen/logrus"
)

// bodies is the verbosity from which client-go logs what it sends and receives. That must never be
// seen: it holds env and secrets.
const bodies = 8

// New returns a logger that writes to log: V(0) as info, V(1) and V(2) as debug, up to V(7) as
// trace, and nothing above. The field "logger" has the logger's name.
func New(log logrus.FieldLogger) logr.Logger {
	entry := log.WithFields(nil)
	return logr.New(&logrusSink{entry: entry})
}

type logrusSink struct {
	entry *logrus.Entry
	name  string
}

var _ logr.LogSink = (*logrusSink)(nil)

func (s *logrusSink) Init(logr.RuntimeInfo) {}

func (s *logrusSink) Enabled(level int) bool {
	return level < bodies && s.entry.Logger.IsLevelEnabled(logrusLevel(level))
}

func (s *logrusSink) Info(level int, msg string, keysAndValues ...any) {
	s.entry.WithFields(fieldsOf(keysAndValues)).Log(logrusLevel(level), msg)
}

func (s *logrusSink) Error(err error, msg string, keysAndValues ...any) {
	s.entry.WithFields(fieldsOf(keysAndValues)).WithError(err).Error(msg)
}

func (s *logrusSink) WithValues(keysAndValues ...any) logr.LogSink {
	return &logrusSink{entry: s.entry.WithFields(fieldsOf(keysAndValues)), name: s.name}
}

func (s *logrusSink) WithName(name string) logr.LogSink {
	if s.name != "" {
		name = s.name + "." + name
	}
	return &logrusSink{entry: s.entry.WithField("logger", name), name: name}
}

func logrusLevel(level int) logrus.Level {
	switch {
	case level <= 0:
		return logrus.InfoLevel
	case level <= 2:
		return logrus.DebugLevel
	}
	return logrus.TraceLevel
}

func fieldsOf(keysAndValues []any) logrus.Fields {
	fields := logrus.Fields{}
	for i := 0; i < len(keysAndValues); i += 2 {
		key := fmt.Sprint(keysAndValues[i])
		if i+1 == len(keysAndValues) {
			fields[key] = "(no value)"
			break
		}
		switch v := keysAndValues[i+1].(type) {
		case logr.Marshaler:
			fields[key] = v.MarshalLog()
		case fmt.Stringer:
			fields[key] = v.String()
		default:
			fields[key] = v
		}
	}
	return fields
}
