// A client in another language: it knows the .proto files and nothing else of this project.
//
//   node client.mjs HOST:PORT PROTOS_FOLDER PROMPT
//
// Lists the adapters, streams one Generate, and prints a JSON object a line: {"adapters": [...]}, then one
// {"event": ..., ...} for every message of the stream. An error is {"error": CODE, "details": ...}, exit 1.
import { join } from "node:path";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, protos, prompt] = process.argv.slice(2);
const DEADLINE_SECONDS = 120;

function print(object) {
  process.stdout.write(JSON.stringify(object) + "\n");
}

function load(file) {
  const path = join("atelier", "v1", file);
  const options = { includeDirs: [protos], keepCase: true, longs: String, enums: String, oneofs: true };
  return grpc.loadPackageDefinition(protoLoader.loadSync(path, options)).atelier.v1;
}

function connect(Service) {
  return new Service(address, grpc.credentials.createInsecure());
}

function deadline() {
  return { deadline: Date.now() + DEADLINE_SECONDS * 1000 };
}

function listAdapters() {
  const client = connect(load("adapter.proto").AdapterService);
  return new Promise((resolve, reject) => {
    client.ListAdapters({}, deadline(), (error, response) => {
      client.close();
      if (error) {
        reject(error);
      } else {
        resolve(response.adapters ?? []);
      }
    });
  });
}

// An event without its bytes: what a reader of the log wants to see, with the picture's first bytes in hex.
function summary({ event, ...message }) {
  const body = { ...message[event] };
  if (body.data) {
    body.head = body.data.subarray(0, 8).toString("hex");
    body.bytes = body.data.length;
    delete body.data;
  }
  return { event, ...body };
}

async function generate() {
  const client = connect(load("generation.proto").GenerationService);
  const request = { prompt, seed: "7", num_inference_steps: 4, guidance_scale: 3.0 };
  try {
    for await (const message of client.Generate(request, deadline())) {
      print(summary(message));
    }
  } finally {
    client.close();
  }
}

try {
  print({ adapters: await listAdapters() });
  await generate();
} catch (error) {
  print({ error: grpc.status[error.code] ?? String(error), details: error.details });
  process.exitCode = 1;
}
