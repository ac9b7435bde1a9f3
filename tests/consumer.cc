// Runs serving_default of a SavedModel of strings on TensorFlow's C API, as TensorFlow Serving does inside.
//
//     consumer DIRECTORY INPUT_OPERATION OUTPUT_OPERATION OUTPUT_NUMBER TEXT...
//
// Writes the strings of that output, a zero byte behind each.

#include <tensorflow/c/c_api.h>
#include <tensorflow/c/tf_tstring.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

static void check(const TF_Status* status) {
  if (TF_GetCode(status) != TF_OK) {
    std::fprintf(stderr, "%s\n", TF_Message(status));
    std::exit(1);
  }
}

int main(int argc, char** argv) {
  const int first = 5;
  if (argc < first) return 2;
  TF_Status* status = TF_NewStatus();
  TF_Graph* graph = TF_NewGraph();
  const char* tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(TF_NewSessionOptions(), nullptr, argv[1], tags, 1, graph, nullptr, status);
  check(status);

  const int64_t count = argc - first;
  TF_Tensor* texts = TF_AllocateTensor(TF_STRING, &count, 1, count * sizeof(TF_TString));
  auto* strings = static_cast<TF_TString*>(TF_TensorData(texts));
  for (int64_t i = 0; i < count; ++i) {
    TF_StringInit(&strings[i]);
    TF_StringCopy(&strings[i], argv[first + i], std::strlen(argv[first + i]));
  }

  const TF_Output input{TF_GraphOperationByName(graph, argv[2]), 0};
  const TF_Output output{TF_GraphOperationByName(graph, argv[3]), std::atoi(argv[4])};
  TF_Tensor* answer = nullptr;
  TF_SessionRun(session, nullptr, &input, &texts, 1, &output, &answer, 1, nullptr, 0, nullptr, status);
  check(status);

  const auto* answers = static_cast<const TF_TString*>(TF_TensorData(answer));
  for (int64_t i = 0; i < count; ++i) {
    std::fwrite(TF_StringGetDataPointer(&answers[i]), 1, TF_StringGetSize(&answers[i]), stdout);
    std::putchar('\0');
  }
  return 0;
}
